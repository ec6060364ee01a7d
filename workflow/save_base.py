"""Write a base model in a variant's precision as a checkpoint of its own.

    python -m workflow.save_base --model results/fetch_model/model --to .cache/bases/nf4 \\
        --precision nf4 --double-quantization --compute float32

Libraries that cannot quantise while they load (lm-evaluation-harness' command line is one) can
then load exactly the quantised base that a run was trained on.
"""

import argparse
from pathlib import Path

from workflow.console import go_offline, quiet_libraries
from workflow.files import whole_folder
from workflow.params import Hardware, Variant


def save_base(model: Path, to: Path, variant: Variant, hardware: Hardware) -> None:
    """Load `model` in the variant's precision and save it, with its tokenizer, in the folder `to`."""
    from transformers import AutoTokenizer

    from workflow.precision import load_base

    base, _ = load_base(model, variant, hardware=hardware)
    with whole_folder(to) as folder:
        base.save_pretrained(folder)
        AutoTokenizer.from_pretrained(model, trust_remote_code=False).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a base model in a variant's precision.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the 16-bit base")
    parser.add_argument("--to", type=Path, required=True, help="folder to write")
    parser.add_argument("--precision", choices=("int8", "nf4", "fp4"), required=True)
    parser.add_argument("--double-quantization", action="store_true")
    parser.add_argument("--compute", choices=("float32", "bfloat16", "float16"), required=True)
    options = parser.parse_args()
    go_offline()
    quiet_libraries()
    variant = Variant(
        method="lora",
        precision=options.precision,
        double_quantization=options.double_quantization,
        compute_dtype=options.compute,
        training={},
    )
    save_base(options.model, options.to, variant, Hardware(device="auto", compute_dtype=options.compute))


if __name__ == "__main__":
    main()
