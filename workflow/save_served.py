"""`python -m workflow.save_served`: the door of workflow/evaluation/export.py."""

from workflow.evaluation.export import main

if __name__ == "__main__":
    main()
