"""What rank stabilization, DoRA, LoRA+, PiSSA, OLoRA and LoftQ compute, held to formulas written anew here."""

import bitsandbytes as bnb
import pytest
import torch
from conftest import CPU
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import AutoConfig

from workflow import methods, params
from workflow.cost import memory, plan, trial
from workflow.evaluation.forms import serve
from workflow.methods.lora import difference
from workflow.models import load
from workflow.runtime.errors import UserError
from workflow.training import initialization, train
from workflow.training.checks import check_model_fits
from workflow.training.speed.fused import base_weight, fuse_adapters
from workflow.training.trainer import model_of

IN, OUT, RANK, ALPHA = 64, 96, 4, 10
ROUNDING = 2**-7  # bfloat16 keeps 8 bits, and a value is rounded more than once
VARIANTS = {
    "lora_rslora": {},
    "lora_plus": {},
    "lora_pissa": {},
    "lora_olora": {},
    "dora_16bit": {},
    "qdora_nf4_dq": {},
    "loftq_nf4_dq": {},
    # By params alone: no file of this project names these.
    "loftq on FP4, DoRA, rank-stabilized, LoRA+": {"method": "dora", "precision": "fp4", "block_size": 64, "training": {
        "initialization": "loftq", "rank_stabilized": True, "b_rate_factor": 4.0}},
    "PiSSA, DoRA, rank-stabilized, LoRA+": {"method": "dora", "training": {
        "initialization": "pissa", "rank_stabilized": True, "b_rate_factor": 2.0}},
    "LoftQ on int8": {"precision": "int8", "training": {"initialization": "loftq"}},
    "DoRA with dropout": {"method": "dora", "training": {"dropout": 0.2}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _alike_each_time():
    load.use_exact_cpu_kernels()
    torch.manual_seed(0)


def run_of(tiny: params.Params, name: str, **changes) -> params.Run:
    """A short run of a variant of `VARIANTS`, checked as a variant of params.yaml is."""
    content = tiny.model_dump()
    plain = content["variants"]["lora_16bit"]
    content["variants"]["it"] = content["variants"].get(name, plain | VARIANTS.get(name, {}))
    run = params.Params.model_validate(content).run("it", 1)
    return params.Run(name, run.variant, 1, run.training, CPU).with_training(
        steps=3, learning_rate=1e-2, rank=4, **changes
    )


def trainer_of(run: params.Run, tiny_model, splits, tmp_path):
    model, precision = load.load_base(tiny_model, run.variant, hardware=CPU)
    return train.build_trainer(
        model,
        train.load_tokenizer(tiny_model),
        run,
        train_rows=splits["train"],
        validation_rows=splits["validation"],
        precision=precision,
        scratch=tmp_path,
    )


class Layer(nn.Module):
    """One linear layer, as a base model of a precision has it."""

    def __init__(self, kind: str, *, bias: bool = False, dtype: torch.dtype = torch.float32):
        super().__init__()
        if kind == "16bit":
            self.linear = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
        elif kind == "int8":
            self.linear = bnb.nn.Linear8bitLt(IN, OUT, bias=bias, has_fp16_weights=False, threshold=6.0).to(
                "cpu"
            )
        else:
            self.linear = bnb.nn.Linear4bit(IN, OUT, bias=bias, compute_dtype=dtype, quant_type=kind).to(
                "cpu", dtype
            )
        self.requires_grad_(False)

    def forward(self, x):
        return self.linear(x)


def adapted(kind: str, *, random_b: bool = True, bias: bool = False, dtype=torch.float32, **options):
    """The only adapted layer of a model, and the weight [out, in] that its base multiplies with."""
    layer = Layer(kind, bias=bias, dtype=dtype)
    model = get_peft_model(layer, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["linear"], **options))
    (adapter,) = methods.get("lora").adapter_layers(model)
    if random_b:
        nn.init.normal_(adapter.lora_B["default"].weight, std=0.1)
    return adapter, base_weight(adapter.base_layer, torch.float32).double()


def parts(adapter) -> list[torch.Tensor]:
    magnitude = [adapter.lora_magnitude_vector["default"].weight] if adapter.lora_magnitude_vector else []
    return [adapter.lora_A["default"].weight, adapter.lora_B["default"].weight, *magnitude]


def distance(found: torch.Tensor, right: torch.Tensor) -> float:
    return ((found.double() - right.double()).norm() / right.double().norm()).item()


@pytest.mark.parametrize("name", ["lora_16bit", "lora_rslora"])
def test_the_scale_is_alpha_over_the_rank_or_over_its_root(tiny, tiny_model, name):
    run = run_of(tiny, name, alpha=10)
    base, _ = load.load_base(tiny_model, run.variant, hardware=CPU)
    model = run.method.wrap(base, run.training)
    layer = run.method.adapter_layers(model)[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(b)
    x = torch.randn(3, layer.in_features)
    scale = 10 / (4 if name == "lora_16bit" else 2)  # of rank 4
    torch.testing.assert_close(layer(x), functional.linear(x, layer.base_layer.weight + scale * b @ a))


def dora(x, weight, a, b, magnitude, bias):
    """Liu et al. 2024, equation 5, its norm a constant: the product B A added up, in float64."""
    direction = weight + ALPHA / RANK * b @ a
    norm = direction.detach().square().sum(1).sqrt()
    out = x @ (magnitude / norm * direction.T)
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["16bit", "nf4", "fp4"])
def test_a_dora_layer_scales_each_output_by_magnitude_over_norm(kind, fused, bias):
    adapter, weight = adapted(kind, use_dora=True, bias=bias)
    nn.init.uniform_(parts(adapter)[2], 0.5, 1.5)
    if fused:
        assert fuse_adapters(adapter, compute=torch.float32) == 1
    x = torch.randn(2, 5, IN, requires_grad=True)
    inputs = [x, *parts(adapter)]
    found = adapter(x)
    doubled = [tensor.double() for tensor in inputs]
    right = dora(doubled[0], weight, *doubled[1:], adapter.base_layer.bias)
    assert distance(found, right) < 1e-5
    out = torch.randn(right.shape, dtype=torch.float64)
    gradients = zip(
        torch.autograd.grad(found, inputs, out.to(found.dtype)),
        torch.autograd.grad(right, inputs, out),
        strict=True,
    )
    assert all(distance(*pair) < 2e-5 for pair in gradients)


@pytest.mark.parametrize("kind", ["16bit", "nf4"])
def test_in_bfloat16_a_small_change_of_a_magnitude_is_not_rounded_away(kind):
    adapter, _ = adapted(kind, use_dora=True, dtype=torch.bfloat16)
    fuse_adapters(adapter, compute=torch.bfloat16)
    weight = base_weight(adapter.base_layer, torch.bfloat16).double()
    magnitude = parts(adapter)[2]
    assert magnitude.dtype == torch.float32
    x = torch.randn(400, IN, dtype=torch.bfloat16)
    with torch.no_grad():
        a, b, _ = (part.double() for part in parts(adapter))
        right = dora(x.double(), weight, a, b, magnitude.double(), None)
        assert distance(adapter(x), right) < ROUNDING
        before = adapter(x).double().norm()
        magnitude.mul_(1.001)  # bfloat16 has no number between 1 and 1.0078
        assert adapter(x).double().norm() / before == pytest.approx(1.001, abs=2e-4)


def test_a_dora_layer_begins_as_its_base():
    adapter, weight = adapted("nf4", use_dora=True, random_b=False)
    torch.testing.assert_close(parts(adapter)[2].double(), weight.square().sum(1).sqrt())
    fuse_adapters(adapter, compute=torch.float32)
    x = torch.randn(3, IN)
    assert distance(adapter(x), x.double() @ weight.T) < 1e-6


def test_pissa_takes_the_largest_singular_values_out_of_the_base():
    torch.manual_seed(3)
    weight = Layer("16bit").linear.weight.double()
    torch.manual_seed(3)
    adapter, residual = adapted("16bit", random_b=False, init_lora_weights="pissa")
    a, b = (part.detach().double() for part in parts(adapter))
    product = ALPHA / RANK * b @ a
    assert distance(residual + product, weight) < 1e-6
    # The eigenvalues of W^T W are the squares of W's singular values.
    squares = torch.linalg.eigvalsh(weight.T @ weight).flip(0)
    assert product.square().sum() == pytest.approx(squares[:RANK].sum().item(), rel=1e-5)
    assert residual.square().sum() == pytest.approx(squares[RANK:].sum().item(), rel=1e-5)


def test_olora_takes_the_first_directions_of_the_qr_decomposition():
    torch.manual_seed(3)
    weight = Layer("16bit").linear.weight.double()
    torch.manual_seed(3)
    adapter, residual = adapted("16bit", random_b=False, init_lora_weights="olora")
    a, b = (part.detach().double() for part in parts(adapter))
    assert distance(residual + ALPHA / RANK * b @ a, weight) < 1e-6
    torch.testing.assert_close(b.T @ b, torch.eye(RANK, dtype=torch.float64), atol=1e-5, rtol=0)
    # Without its scale the product is the projection of the weight onto its first columns.
    columns = weight[:, :RANK]
    projection = columns @ torch.linalg.inv(columns.T @ columns) @ columns.T @ weight
    assert distance(b @ a, projection) < 1e-5


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_loftq_makes_up_for_as_much_of_the_loss_as_a_rank_can(kind, use_dora):
    adapter, held = adapted(kind, random_b=False, use_dora=use_dora)
    original = held + 0.01 * torch.randn(OUT, IN, dtype=torch.float64)
    initialization._begin(adapter, original.float())
    a, b, *magnitude = (part.detach().double() for part in parts(adapter))
    error = original - held
    squares = torch.linalg.eigvalsh(error.T @ error).flip(0)
    left = error - ALPHA / RANK * b @ a
    assert left.square().sum() == pytest.approx(squares[RANK:].sum().item(), rel=1e-4)
    if use_dora:
        assert distance(magnitude[0], (held + ALPHA / RANK * b @ a).square().sum(1).sqrt()) < 1e-6


def test_loftq_finds_each_layer_in_the_files_of_the_base(tiny, tiny_model):
    run = run_of(tiny, "loftq_nf4_dq")
    published, _ = load.load_base(tiny_model, tiny.variants["lora_16bit"], hardware=CPU)
    model = run.method.wrap(load.load_base(tiny_model, run.variant, hardware=CPU)[0], run.training)
    initialization.correct_quantization(model)
    originals = load.base_linears(published)
    for name, layer in model.get_base_model().named_modules():
        if isinstance(getattr(layer, "lora_A", None), nn.ModuleDict):
            a, b = parts(layer)
            held, scale = base_weight(layer.base_layer, torch.float32), layer.scaling["default"]
            before = (originals[name].weight - held).norm()
            assert (originals[name].weight - held - scale * b @ a).norm() < 0.99 * before


@pytest.mark.parametrize("name", ["lora_pissa", "lora_olora", "loftq_nf4_dq"])
def test_a_base_has_no_more_directions_than_its_narrowest_layer_is_wide(name, tiny, tiny_model):
    run = run_of(tiny, name)
    model, _ = load.load_base(tiny_model, run.variant, hardware=CPU)
    narrowest = min(min(layer.out_features, layer.in_features)
                    for layer in load.base_linears(model).values())  # fmt: skip
    check_model_fits(model, run.with_training(rank=narrowest).training)
    with pytest.raises(
        UserError, match=f"rank is {narrowest + 1} and initialization .* no more than {narrowest}"
    ):
        check_model_fits(model, run.with_training(rank=narrowest + 1).training)
    check_model_fits(model, run.with_training(rank=narrowest + 1, initialization="default").training)


def test_b_learns_at_its_own_rate(tiny, tiny_model, splits, tmp_path):
    run = run_of(tiny, "lora_plus", schedule="constant", warmup_fraction=0.0)
    trainer = trainer_of(run, tiny_model, splits, tmp_path)
    names = {id(p): name for name, p in model_of(trainer).named_parameters()}
    rates = {
        names[id(p)].split(".")[-3]: group["lr"]
        for group in (trainer.create_optimizer(), trainer.create_optimizer())[1].param_groups
        for p in group["params"]
    }
    assert rates == {"lora_A": 1e-2, "lora_B": 0.16}
    # Adam's first step moves a weight by its learning rate, whatever its gradient.
    b = methods.get("lora").adapter_layers(model_of(trainer))[0].lora_B["default"].weight
    trainer.args.max_steps = 1
    trainer.train()
    assert b.abs().max().item() == pytest.approx(0.16, rel=1e-3)


def test_the_difference_from_the_beginning_is_what_was_trained():
    names = [f"x.lora_{part}.default.weight" for part in "AB"] + ["x.lora_magnitude_vector.default.weight"]
    a, b, a0, b0, m = (torch.randn(*size) for size in [(4, 9), (7, 4), (4, 9), (7, 4), (7,)])
    weights = dict(zip(names, (a, b, m), strict=True))
    made = difference(weights, dict(zip(names, (a0, b0, m + 1), strict=True)))
    torch.testing.assert_close(made[names[1]] @ made[names[0]], b @ a - b0 @ a0)
    assert made[names[2]] is m


@pytest.mark.parametrize("name", VARIANTS)
def test_a_saved_run_is_what_was_trained(name, tiny, tiny_model, splits, tmp_path):
    """Trained, saved and loaded on the published base: the same logits; merged, the same up to the 16 bits."""
    run = run_of(tiny, name)
    trainer = trainer_of(run, tiny_model, splits, tmp_path)
    assert trainer.speed_ups.fused_adapters == ("dropout" not in name)
    train.check_trainable(model_of(trainer), run.method, run.training)
    trainer.train()
    model = model_of(trainer).eval()
    trainer.causal_model.set_attn_implementation("sdpa")  # for rows that are not packed
    weights = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}
    ids = torch.arange(3, 40)[None] % model.config.vocab_size
    logits = {}
    with torch.no_grad():
        logits["trained"] = model(input_ids=ids).logits
        train.save(model, run.method, tmp_path / "weights", weights=weights, initial=trainer.initial)
        base, _ = load.load_base(tiny_model, run.variant, hardware=CPU)
        logits["base"] = base.eval()(input_ids=ids).logits
        for form in ("as_trained", "merged_16bit", "merged_dequantized", "requantized"):
            if params.can_be_served(run.variant, form):
                served, _ = serve(run, form, model_folder=tiny_model, weights_folder=tmp_path / "weights")
                logits[form] = served(input_ids=ids).logits
    learned = (logits["trained"] - logits["base"]).norm()
    apart = {form: ((found - logits["trained"]).norm() / learned).item() for form, found in logits.items()}
    exact = "merged_dequantized" if "merged_dequantized" in apart else "merged_16bit"
    assert apart["as_trained"] < 1e-4 and apart["base"] == 1
    # int8 rounds activations, and the dequantized model does not.
    assert apart[exact] < (0.5 if run.variant.precision == "int8" else 0.05)
    assert all(distance < 1 for form, distance in apart.items() if form != "base")


def test_the_plan_says_where_dora_keeps_more_than_it_counts(tiny, tiny_model):
    config = AutoConfig.from_pretrained(tiny_model)
    for dropout, said in ((0.0, False), (0.2, True)):
        variant = tiny.variants["dora_16bit"].model_copy(update={"training": {"dropout": dropout}})
        settings = tiny.model_copy(update={"variants": {"dora": variant}})
        notes = plan.caveats(config, settings, length=64)
        assert any(note.startswith("Of dora a speed-up under training is off") for note in notes) == said


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_passes_the_trial(name, tiny, tiny_model):
    run = run_of(tiny, name)
    assert trial.try_variant(tiny_model, run.variant, run.training, rest="") == ""


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("name", ["lora_rslora", "lora_pissa", "dora_16bit", "qdora_nf4_dq"])
def test_trained_weights_are_counted_as_peft_makes_them(name, targets, tiny, tiny_model):
    run = run_of(tiny, name, target_modules=targets)
    base, _ = load.load_base(tiny_model, run.variant, hardware=CPU)
    shape = memory.Shape.of(base.config)
    model = run.method.wrap(base, run.training)
    made = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert run.method.adapter_parameters(shape, run.training) == made
    assert run.method.trained_parameters(shape, run.training) == made
    # For DoRA: LoRA's rank x (in + out), and one number for each output.
    sizes = [size for key, size in shape.linears.items() if targets == "all-linear" or key in targets]
    each = sum(4 * (inputs + outputs) + ("dora" in name) * outputs for inputs, outputs in sizes)
    assert made == shape.layers * each
