"""`python -m workflow.merge_diagnostic`: the door of workflow/tools/merge_diagnostic.py."""

from workflow.tools.merge_diagnostic import main

if __name__ == "__main__":
    main()
