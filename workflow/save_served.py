"""`python -m workflow.save_served`: the door of workflow/evaluation/save_served.py."""

from workflow.evaluation.save_served import main

if __name__ == "__main__":
    main()
