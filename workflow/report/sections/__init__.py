"""The sections of the page. Each turns the facts into the variables of the template of its name.

In: `Facts`. Out: one data class per section, with rows, figures and sentences.
"""
