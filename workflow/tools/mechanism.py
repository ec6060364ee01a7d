"""How much of the 4-bit gap comes from the grid to which the base was already rounded (docs/mechanism.md).

    python -m workflow.mechanism bases mechanism --cells 0.25 --seeds 1 2 3
    python -m workflow.study run mechanism --model studies/unmoved.yaml      # and with moved_1.yaml, moved_2.yaml, ...
    python -m workflow.mechanism compare studies/mechanism_on_*/

`bases` writes the params whose models the studies are of. `compare` takes the folders of the finished studies, and writes
gaps.csv, losses.csv, mechanism.md and index.html. `make mechanism` does all of it. With --inputs it also copies what it read of
each study into the folder's studies/, so that the comparison can be made again from there.

    python -m workflow.study run mechanism --target sample
    python -m workflow.mechanism heal studies/mechanism --layers 30 24 18
    python -m workflow.study run studies/healed_30.yaml                      # and healed_24.yaml, healed_18.yaml
    python -m workflow.mechanism depths studies/healed_30 studies/healed_24 studies/healed_18

do the same for bases of fewer layers, each healed by full training on rows that no split uses. `make depths` does all of it.

    python -m workflow.mechanism changes studies/curves at_700_rows:at_11200_rows at_rank_4:at_rank_256

says of one finished study how the gap changes from one pair of its `comparison.repairs` to another, and writes changes.csv.
It reads a published study, such as results/studies/curves, too, and writes nothing there.
"""

import argparse
import shutil
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from workflow import params
from workflow.params import editing
from workflow.runtime import gpus
from workflow.runtime.errors import UserError
from workflow.runtime.files import whole_folder, write_text
from workflow.runtime.paths import DVC_LOCK, ENVIRONMENT
from workflow.runtime.stage import offline_command, say
from workflow.tools import depth_page, mechanism_page
from workflow.tools.arguments import at_least
from workflow.tools.changes import flat_changes, measure_changes
from workflow.tools.depths import Depth, DepthGap, measure_depths, measure_losses, read_depths
from workflow.tools.gaps import Gap, Loss, VariantGaps, losses, measure_gaps
from workflow.tools.healing import heal
from workflow.tools.moved_studies import READ, SAYS, TASK, UNIT, Study, is_published, read, read_study

STUDIES = Path("studies")
UNMOVED, MOVED = "unmoved.yaml", "moved_{seed}.yaml"
GAPS, LOSSES, TEXT, PAGE = "gaps.csv", "losses.csv", "mechanism.md", "index.html"
CHANGES = "changes.csv"
INPUTS, RECORDS = "studies", (ENVIRONMENT, DVC_LOCK)


def write_bases(study: str, *, cells: float, seeds: list[int], folder: Path = STUDIES) -> list[Path]:
    """Write a study's params with the base as it is, and with each draw of a moved one.

    Args:
        study: a preset's name, or the path of a params file.

    Raises:
        UserError: there are no such params, or their base cannot be moved; nothing is written.
    """
    if study.endswith(".yaml"):
        params.load(Path(study))
        text = Path(study).read_text(encoding="utf-8")
    else:
        text = params.complete_text(study)
    texts = {UNMOVED: editing.with_value(text, "model", "moved", None)}
    for seed in seeds:
        moved = {"cells": cells, "seed": seed}
        texts[MOVED.format(seed=seed)] = editing.with_value(text, "model", "moved", moved)
    paths = []
    for name, content in texts.items():
        path = folder / name
        write_text(path, content)
        try:
            params.load(path)
        except UserError:
            for written in (*paths, path):
                written.unlink()
            raise
        paths.append(path)
    return paths


def flat_gaps(gaps: list[VariantGaps]) -> pd.DataFrame:
    """A row for each variant and moment, in nats per token; less is better."""
    rows = []
    for variant in gaps:
        for moment, gap, ratios in (
            ("before", variant.before, False),
            ("after", variant.after, True),
        ):
            row = {"variant": variant.variant, "training": moment, "task": TASK, "unit": UNIT}
            row |= _flat_gap(gap)
            if ratios:
                row |= _flat_ratio("ratio_unmoved", variant.ratio_unmoved)
                row |= _flat_ratio("ratio_moved", variant.ratio_moved)
                row |= {f"above_third_{key}": getattr(variant.above_third, key) for key in SAYS}
                row |= {"margin": variant.margin, "answer": variant.answer, "reason": variant.reason}
            rows.append(row)
    return pd.DataFrame(rows)


def _flat_gap(gap: Gap) -> dict:
    named = {"unmoved": gap.unmoved, "moved": gap.moved, "change": gap.change}
    values = {f"{name}_{key}": getattr(part, key) for name, part in named.items() for key in SAYS}
    return values | {
        "confidence": gap.change.confidence,
        "items": gap.change.items,
        "groups": gap.change.groups,
    }


def _flat_ratio(name: str, ratio) -> dict:
    return {f"{name}_{key}": getattr(ratio, key, None) for key in ("value", "low", "high")}


def write(unmoved: Study, moved: list[Study], folder: Path, *, inputs: bool = False) -> list[VariantGaps]:
    """Compare the studies, and write the tables and the page into a folder, whole or not at all.

    Args:
        inputs: whether to put what was read of each study there as well.

    Raises:
        UserError: the folder has other files, such as those of a study.
    """
    _check_free(folder)
    gaps, scored = measure_gaps(unmoved, moved), losses(unmoved, moved)
    contents = {
        GAPS: flat_gaps(gaps).to_csv(index=False),
        LOSSES: flat_losses(scored).to_csv(index=False),
        TEXT: mechanism_page.as_markdown(gaps, scored, unmoved, moved),
        PAGE: mechanism_page.render(gaps, scored, unmoved, moved),
    }
    _write_whole(folder, contents, [unmoved, *moved] if inputs else [])
    return gaps


def write_depths(depths: list[Depth], folder: Path, *, inputs: bool = False) -> list[DepthGap]:
    """Compare the studies of healed bases as `write` does those of moved ones.

    Raises:
        UserError: as for `write`.
    """
    _check_free(folder)
    gaps, scored = measure_depths(depths), measure_losses(depths)
    contents = {
        GAPS: depth_page.flat_depths(gaps).to_csv(index=False),
        LOSSES: depth_page.flat_depth_losses(scored).to_csv(index=False),
        TEXT: depth_page.as_markdown(gaps, scored, depths),
        PAGE: depth_page.render(gaps, scored, depths),
    }
    _write_whole(folder, contents, [depth.study for depth in depths] if inputs else [])
    return gaps


def _write_whole(folder: Path, contents: dict[str, str], studies: list[Study]) -> None:
    """Write files by their names, and copies of what was read of some studies, into a folder: all or nothing."""
    with whole_folder(folder) as unfinished:
        for name, text in contents.items():
            write_text(unfinished / name, text)
        _copy_inputs(studies, unfinished / INPUTS)


def _check_free(folder: Path) -> None:
    """Raise a UserError if a folder has files that no comparison writes."""
    others = [path.name for path in folder.glob("*") if path.name not in (GAPS, LOSSES, TEXT, PAGE, INPUTS)]
    if others:
        raise UserError(f"{folder} has other files, such as {others[0]}; --folder names another one.")


def flat_losses(scored: list[Loss]) -> pd.DataFrame:
    """A row for each variant and base, in nats per token; an empty draw is the base as it is."""
    frame = pd.DataFrame([asdict(loss) for loss in scored]).astype({"draw": "Int64"})
    return frame.assign(task=TASK, unit=UNIT)


def _copy_inputs(studies: list[Study], folder: Path) -> None:
    """Copy what a comparison reads of finished studies, and the records of how they were run where there are any."""
    for study in studies:
        for path in (*READ, *(path for path in RECORDS if (study.folder / path).is_file())):
            target = folder / study.folder.name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(study.file(path), target)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m workflow.mechanism",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    bases = actions.add_parser("bases", help="write the params whose models the studies are of")
    bases.add_argument("study", help="a preset's name, or the path of a params file")
    bases.add_argument(
        "--cells", type=float, required=True, help="each weight moves by up to so much of its cell"
    )
    bases.add_argument("--seeds", type=at_least(0), nargs="+", required=True, help="one for each draw")
    healing = actions.add_parser("heal", help="cut a study's base in depth, and heal it on rows of no split")
    healing.add_argument("study", type=Path, help="the folder of a study whose stage sample has run")
    healing.add_argument("--layers", type=at_least(1), nargs="+", required=True, help="of each healed base")
    healing.add_argument(
        "--variant", default="healing", help="of the study's params, how to heal (default %(default)s)"
    )
    healing.add_argument(
        "--variants", nargs="+", help="of the studies on the healed bases (default: its own)"
    )
    compare = actions.add_parser("compare", help="compare finished studies of moved bases")
    compare.add_argument(
        "folders", type=Path, nargs="+", help="of the studies: one unmoved, two or more moved"
    )
    depths = actions.add_parser("depths", help="compare finished studies of healed bases")
    depths.add_argument("folders", type=Path, nargs="+", help="of the studies, one of them of the full depth")
    for action, name in ((compare, "compared_mechanism"), (depths, "compared_depths")):
        action.add_argument(
            "--folder",
            type=Path,
            default=STUDIES / name,
            help="of the tables and the page (default %(default)s)",
        )
        action.add_argument("--inputs", action="store_true", help="put what is read of each study there, too")
    changes = actions.add_parser("changes", help="say how a gap changes from one pair of a study to another")
    changes.add_argument("study", type=Path, help="the folder of a finished study, or of a published one")
    changes.add_argument(
        "pairs",
        type=_two_names,
        nargs="+",
        help="FIRST:LAST, two of its comparison.repairs: the last less the first",
    )
    changes.add_argument(
        "--csv",
        type=Path,
        help=f"where the table is written (default STUDY/{CHANGES}; of a published study, nowhere)",
    )
    return parser


def _two_names(text: str) -> tuple[str, str]:
    first, colon, last = text.partition(":")
    if not (first and colon and last):
        raise argparse.ArgumentTypeError(f"{text} is not FIRST:LAST, two names of comparison.repairs")
    return first, last


def _say_changes(study: Path, pairs: list[tuple[str, str]], csv: Path | None) -> None:
    found = measure_changes(read_study(study), pairs)
    if csv is None and not is_published(study):
        csv = study / CHANGES
    if csv:
        write_text(csv, flat_changes(found).to_csv(index=False))
    for one in found:
        first, last = (mechanism_page.interval(gap) for gap in one.gaps)
        say(
            f"{one.first} to {one.last}: {one.answer}. The gap is {first}, then {last}: it changes by "
            f"{mechanism_page.interval(one.change)} {UNIT}."
        )
    if csv:
        say(f"{csv} is written.")


def main() -> None:
    options = _parser().parse_args()
    with offline_command("mechanism"):
        match options.action:
            case "bases":
                paths = write_bases(options.study, cells=options.cells, seeds=options.seeds)
                say(f"written: {', '.join(map(str, paths))}")
                return
            case "heal":
                how = {"variant": options.variant, "compared": options.variants}
                with gpus.reserved(1, sharers=gpus.allowed_sharers("train", gpus=1), say=say):
                    paths = heal(options.study, layers=options.layers, folder=STUDIES, **how)
                say(f"written: {', '.join(map(str, paths))}")
                return
            case "changes":
                _say_changes(options.study, options.pairs, options.csv)
                return
            case "compare":
                gaps = write(*read(options.folders), options.folder, inputs=options.inputs)
                answers = [f"{gap.variant}: {gap.answer}; {gap.reason}" for gap in gaps]
            case "depths":
                found = write_depths(read_depths(options.folders), options.folder, inputs=options.inputs)
                answers = depth_page.answers(found)
        for answer in answers:
            say(answer)
        say(f"{', '.join(str(options.folder / name) for name in (PAGE, TEXT, GAPS, LOSSES))} are written.")


if __name__ == "__main__":
    main()
