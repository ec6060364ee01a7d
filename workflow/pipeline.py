"""`python -m workflow.pipeline`: the door of workflow/engine/pipeline.py."""

from workflow.engine.pipeline import main

if __name__ == "__main__":
    main()
