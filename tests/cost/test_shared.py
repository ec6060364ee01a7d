"""What a card needs of a training that several processes share: held to what FSDP2 really has in memory at once."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import get_peft_model
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from workflow import params
from workflow.cost import memory
from workflow.methods.lora import LORA
from workflow.runtime.paths import PARAMS
from workflow.training.sharding import FSDP

SMALL, LARGE = 64, 24000  # tokens of a vocabulary whose head is less than a decoder layer, and more than two


@pytest.fixture(scope="module")
def asked() -> params.Params:
    return params.load(PARAMS)


def shape_of(name: str) -> memory.Shape:
    return memory.Shape.of(AutoConfig.from_pretrained(params.SHAPES / f"{name}.json"))


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, at every operation."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, weakref.ref] = {}
        self.peak = 0

    def add(self, tensor: torch.Tensor) -> None:
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        known = self.storages.get(storage._cdata)
        if known is None or known() is None:
            self.storages[storage._cdata] = weakref.ref(storage)

    def bytes(self) -> int:
        alive = {key: found for key, ref in self.storages.items() if (found := ref()) is not None}
        self.storages = {key: self.storages[key] for key in alive}
        return sum(storage.nbytes() for storage in alive.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_flatten((args, kwargs, result))[0]:
            if isinstance(value, torch.Tensor):
                self.add(value)
        self.peak = max(self.peak, self.bytes())
        return result


def peak_of_a_step(config: LlamaConfig, training: params.Training, *, processes: int, passes: int) -> int:
    """The most bytes of one of so many processes in its second step, of passes of two tokens, on a CPU.

    The other processes are made up: what is gathered from them is noise, which takes as much memory.
    """
    distributed.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        model = get_peft_model(
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), LORA.peft_config(training)
        )
        if training.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=FSDP["version"],
            reshard_after_forward=FSDP["reshard_after_forward"],
            cpu_ram_efficient_loading=FSDP["cpu_ram_efficient_loading"],
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )
        accelerator = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            mixed_precision="no",
            is_main_process=True,
            device=torch.device("cpu"),
        )
        fsdp2_prepare_model(accelerator, model.train())
        live = Live()
        for parameter in model.parameters():
            live.add(parameter)
        for _ in range(2):
            live.peak = 0
            model.zero_grad()
            with live:
                for number in range(passes):
                    model.set_requires_gradient_sync(number == passes - 1)  # accelerate's `no_sync`
                    model(input_ids=torch.arange(2)[None], use_cache=False).logits.sum().backward()
        return live.peak
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("processes", "rank", "checkpointing", "tied", "vocabulary", "passes"),
    [
        # The peak is in the last decoder layer in forward,
        (2, 16, True, False, SMALL, 1),
        (2, 16, False, False, SMALL, 1),
        (4, 16, True, False, SMALL, 1),
        (2, 16, True, False, SMALL, 2),
        (2, 16, True, True, SMALL, 1),
        # at the head, at a tied embedding,
        (2, 16, True, False, LARGE, 1),
        (4, 16, True, True, LARGE, 2),
        # in the last decoder layer in backward, and at the embedding at the end.
        (4, 128, True, False, SMALL, 2),
        (2, 128, True, True, SMALL, 1),
        (2, 128, True, False, LARGE, 1),
    ],
)
def test_a_process_holds_what_the_formula_counts(
    asked, processes, rank, checkpointing, tied, vocabulary, passes
):
    """Weights, gathered ones and gradients, on passes so short that little else is in memory."""
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        pad_token_id=None,
    )
    training = asked.training.model_copy(
        update={
            "rank": rank,
            "gradient_checkpointing": checkpointing,
            "batch_rows": processes * passes,
            "micro_batch_rows": 1,
        }
    )
    need = memory.predict_shared(
        memory.Shape.of(config), asked.variants["lora_16bit"], training, tokens=2, processes=processes
    )
    expected = need.total - need.optimizer - need.workspace
    found = peak_of_a_step(config, training, processes=processes, passes=passes)
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", ["lora_16bit", "qlora_nf4", "qlora_nf4_dq"])
@pytest.mark.parametrize("shape", ["llama2_70b", "qwen2_5_0_5b"])
def test_each_of_n_cards_holds_an_nth_of_the_weights_and_all_constants(asked, name, shape):
    shape, variant = shape_of(shape), asked.variants[name]
    whole, constants = memory.weights(shape, variant)
    alone = memory.predict(shape, variant, asked.training, tokens=512)
    totals = []
    for processes in (2, 3, 4, 8):
        need = memory.predict_shared(shape, variant, asked.training, tokens=512, processes=processes)
        tensors = shape.layers * len(shape.linears) + 1  # each is rounded up
        assert whole / processes <= need.weights <= whole / processes + tensors * memory.ALLOCATION
        assert need.quantization_constants == constants
        assert 0 <= need.adapters - alone.adapters / processes < 4
        assert 0 <= need.optimizer - alone.optimizer / processes < 8
        assert need.total > constants + need.gathered + need.activations
        totals.append(need.total)
    assert totals == sorted(totals, reverse=True)
    many = memory.predict_shared(shape, variant, asked.training, tokens=512, processes=10**9)
    shared = many.weights + many.adapters + many.optimizer
    assert many.total - shared < totals[-1] and shared < 0.01 * many.total


def test_one_process_needs_what_was_predicted_before(asked):
    config = AutoConfig.from_pretrained(params.SHAPES / "llama2_7b.json")
    shape, variant = memory.Shape.of(config), asked.variants["qlora_nf4_dq"]
    need = memory.predict(shape, variant, asked.training, tokens=2048)
    assert memory.predict_per_card(shape, variant, asked.training, tokens=2048, processes=1) == need
    assert memory.peak_bytes(config, variant, asked.training, tokens=2048, processes=1) == need.total
    shared = memory.predict_shared(shape, variant, asked.training, tokens=2048, processes=2)
    assert memory.peak_bytes(config, variant, asked.training, tokens=2048, processes=2) == shared.total


def test_gradients_are_whole_where_a_step_has_several_passes(asked):
    shape, variant = shape_of("llama2_7b"), asked.variants["lora_16bit"]
    one, several = (
        memory.predict_shared(
            shape,
            variant,
            asked.training.model_copy(update={"batch_rows": rows, "micro_batch_rows": 2}),
            tokens=4096,
            processes=2,
        )
        for rows in (4, 8)
    )
    whole = memory.predict(shape, variant, asked.training, tokens=4096).gradients
    assert one.gradients < 0.6 * whole < whole <= several.gradients < 1.05 * whole


def test_the_largest_fit_on_a_card_grows_with_their_number(asked):
    shape, variant = shape_of("llama2_13b"), asked.variants["lora_16bit"]
    most = [
        memory.largest_fit(shape, variant, asked.training, gib=memory.usable_gib(24), processes=processes)
        for processes in (1, 2, 4)
    ]
    assert most[0] == 0 < most[1] < most[2]
    need = memory.predict_shared(shape, variant, asked.training, tokens=most[1] + 64, processes=2)
    assert not memory.fits(need, memory.usable_gib(24))
