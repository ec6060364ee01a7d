"""`python -m workflow.compare_logs`: the door of workflow/tools/compare_logs.py."""

from workflow.tools.compare_logs import main

if __name__ == "__main__":
    main()
