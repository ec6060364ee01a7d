"""`python -m workflow.environment`: the door of workflow/runtime/environment.py."""

from workflow.runtime.environment import main

if __name__ == "__main__":
    main()
