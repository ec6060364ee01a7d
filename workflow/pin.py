"""`python -m workflow.pin`: the door of workflow/fetch/pin.py."""

from workflow.fetch.pin import main

if __name__ == "__main__":
    main()
