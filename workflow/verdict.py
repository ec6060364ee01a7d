"""`python -m workflow.verdict`: the door of workflow/report/closing.py."""

from workflow.report.closing import main

if __name__ == "__main__":
    main()
