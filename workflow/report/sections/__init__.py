"""The sections of the page: each takes the facts and hands one object to the template of its name.

In: `Facts`. Out: rows, figures and sentences, in one data class for each section.
"""
