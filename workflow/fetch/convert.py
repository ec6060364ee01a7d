"""Models in the form that the pipeline stores: 16-bit safetensors from GGUF or 32 bits, or with random weights."""

import math
import tempfile
from pathlib import Path

from workflow import params
from workflow.data import model_files
from workflow.runtime.errors import UserError
from workflow.runtime.files import read_json, whole_file, write_json


def gguf_to_safetensors(path: Path, folder: Path) -> str:
    """Write a GGUF file as 16-bit safetensors with its tokenizer; return the format that its weights had.

    Raises:
        UserError: the file cannot be read, or a weight of it is missing or has no place in the architecture.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # In a folder of its own: transformers would read a config.json or tokenizer beside it in place of what it holds.
    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / path.name).symlink_to(path.resolve())
        try:
            model, loading = AutoModelForCausalLM.from_pretrained(
                alone,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
                gguf_file=path.name,
                trust_remote_code=False,
            )
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=path.name, trust_remote_code=False)
        except Exception as error:  # the reader trusts the file's offsets and sizes
            reason = model_files.reason(error).replace(f"{alone}/", "")
            raise UserError(f"{path.name} cannot be read as GGUF: {reason}.") from None
    model_files.check_loaded(loading, path.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"GGUF {path.stem.rpartition('.')[2]}"


def round_to_16_bits(folder: Path) -> str | None:
    """Round float32 weights to bfloat16 in place, file by file; return the type they had, if wider."""
    if "F32" not in describe(folder)["storage_dtype"]:
        return None
    import torch
    from safetensors.torch import load_file, save_file

    for file in model_files.weights_files(folder):
        narrow = {
            name: tensor.bfloat16() if tensor.dtype == torch.float32 else tensor
            for name, tensor in load_file(file).items()
        }
        with whole_file(file) as unfinished:
            save_file(narrow, unfinished, metadata={"format": "pt"})
    config = read_json(folder / "config.json")
    config.pop("torch_dtype", None)
    write_json(folder / "config.json", config | {"dtype": "bfloat16"})
    return "F32"


def describe(folder: Path) -> dict:
    """Count the parameters of a model and name their type, from the headers of the safetensors alone.

    Returns:
        `parameters` and `storage_dtype`, in which several types are joined by a plus sign.
    """
    from safetensors import safe_open

    parameters, types = 0, set()
    for file in model_files.weights_files(folder):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (it is not a dict)
                tensor = weights.get_slice(name)
                parameters += math.prod(tensor.get_shape())
                types.add(tensor.get_dtype())
    return {"parameters": parameters, "storage_dtype": "+".join(sorted(types))}


def random_llama(model: params.RandomModel, folder: Path) -> None:
    """Write a Llama with random weights, and a tokenizer of single bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer(vocabulary=model.vocabulary, max_positions=model.max_positions)
    config = LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.attention_heads,
        num_key_value_heads=model.key_value_heads,
        max_position_embeddings=model.max_positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(model.seed)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def byte_tokenizer(*, vocabulary: int, max_positions: int):
    """Make a tokenizer of single bytes, which needs no vocabulary file.

    Args:
        vocabulary: tokens, those that no text uses included.
        max_positions: tokens that the model can hold.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # As many tokens as the model has: lm-evaluation-harness cuts a model's vocabulary to that of its tokenizer.
    unused = [f"<unused_{index}>" for index in range(vocabulary - len(special) - len(alphabet))]
    tokens = {token: index for index, token in enumerate(special + alphabet + unused)}
    bytes_only = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=max_positions,
    )
