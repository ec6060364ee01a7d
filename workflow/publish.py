"""`python -m workflow.publish`: the door of workflow/engine/publish.py."""

from workflow.engine.publish import main

if __name__ == "__main__":
    main()
