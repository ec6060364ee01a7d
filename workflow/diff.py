"""`python -m workflow.diff`: the door of workflow/report/changes.py."""

from workflow.report.changes import main

if __name__ == "__main__":
    main()
