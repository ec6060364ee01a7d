"""The pipeline as a whole: DVC, Snakemake, studies and their publication.

In: dvc.yaml and the workspace. Out: stages run in order, marks for Snakemake, packed and published studies.
"""
