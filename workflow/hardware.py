"""`python -m workflow.hardware`: the door of workflow/cost/hardware.py."""

from workflow.cost.hardware import main

if __name__ == "__main__":
    main()
