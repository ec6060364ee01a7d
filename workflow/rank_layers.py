"""`python -m workflow.rank_layers`: the door of workflow/models/rank_layers.py."""

from workflow.models.rank_layers import main

if __name__ == "__main__":
    main()
