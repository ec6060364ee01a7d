"""`python -m workflow.mechanism`: the door of workflow/tools/mechanism.py."""

from workflow.tools.mechanism import main

if __name__ == "__main__":
    main()
