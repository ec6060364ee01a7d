"""`python -m workflow.quick`: the door of workflow/tools/quick.py."""

from workflow.tools.quick import main

if __name__ == "__main__":
    main()
