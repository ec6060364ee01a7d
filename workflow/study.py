"""`python -m workflow.study`: the door of workflow/engine/study.py."""

from workflow.engine.study import main

if __name__ == "__main__":
    main()
