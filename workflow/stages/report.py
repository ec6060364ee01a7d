"""Stage report: render the page, and the headline as Markdown, CSV and model cards, from the stages' files alone."""

from workflow import params
from workflow.runtime.files import whole_folder, write_text
from workflow.runtime.paths import CARDS, REPORT, SUMMARY, SUMMARY_TABLE
from workflow.runtime.stage import run_stage, say


def report() -> None:
    """Write the page about the runs that params.yaml names, and what is made from the same numbers."""
    # Not before run_stage has looked at what the environment holds: the hub's library reads it when it is imported.
    from workflow.report.cards import model_card
    from workflow.report.facts import gather
    from workflow.report.page import render
    from workflow.report.summary import summary_markdown, summary_table

    facts = gather(params.load())
    page = render(facts)
    write_text(SUMMARY, summary_markdown(facts))
    write_text(SUMMARY_TABLE, summary_table(facts).to_csv(index=False))
    with whole_folder(CARDS) as cards:
        for variant in facts.variants:
            for seed in facts.params.experiment.seeds:
                card = model_card(facts, variant, seed)
                write_text(cards / variant.name / str(seed) / "README.md", card)
    write_text(REPORT, page)
    for sentence in facts.lock.mismatches:
        say(f"  not as in dvc.lock: {sentence}")
    say(f"  {REPORT}: {len(page.encode()) / 1000:,.0f} kB, opens in a browser as it is")


if __name__ == "__main__":
    run_stage("report", report)
