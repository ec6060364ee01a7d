"""The page: facts are gathered from the stages' files, put into words and figures, and rendered.

In: what the stages wrote. Out: report/index.html, a summary, tables, figures and model cards.
"""
