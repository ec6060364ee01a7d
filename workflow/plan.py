"""`python -m workflow.plan`: the door of workflow/cost/plan.py."""

from workflow.cost.plan import main

if __name__ == "__main__":
    main()
