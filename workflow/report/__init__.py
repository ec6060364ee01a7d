"""The page: facts are gathered from the stages' files, put into words and figures, and rendered."""
