"""Stage report: render the page from the stages' files alone."""

from workflow import params
from workflow.console import run_stage, say
from workflow.files import write_text
from workflow.paths import REPORT
from workflow.report.facts import gather
from workflow.report.page import render


def report() -> None:
    """Write the page about the runs that params.yaml names."""
    page = render(gather(params.load()))
    write_text(REPORT, page)
    say(f"  {REPORT}: {len(page.encode()) / 1000:,.0f} kB, opens in a browser as it is")


if __name__ == "__main__":
    run_stage("report", report)
