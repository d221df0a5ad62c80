import sys

import pytest
import torch
from torch import nn

from fedstill.errors import InputError
from fedstill.models import Backbone, batch_norms, build_model, list_models, parameter_count
from fedstill.models.fedmd import FEDMD_MODELS


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(name: str, shape: tuple[int, ...], classes: int = 10, **options) -> nn.Module:
    return build_model(name, input_shape=shape, num_classes=classes, generator=stream(), **options)


@pytest.mark.parametrize("norm", ["gn", "bn"])
@pytest.mark.parametrize(
    ("stem", "classes", "count"),
    [
        ("imagenet", 10, 11_181_642),
        ("imagenet", 100, 11_227_812),
        ("imagenet", 200, 11_279_112),
        ("cifar", 10, 11_173_962),
        ("cifar", 100, 11_220_132),
        ("cifar", 200, 11_271_432),
    ],
)
def test_resnet18_has_the_published_sizes(norm, stem, classes, count):
    model = build("resnet18", (3, 32, 32), classes, stem=stem, norm=norm)
    assert parameter_count(model) == count
    norms = [part for part in model.modules() if isinstance(part, nn.GroupNorm)]
    assert len(batch_norms(model)) == (20 if norm == "bn" else 0)
    assert len(norms) == (0 if norm == "bn" else 20)
    assert all(part.num_groups == 2 for part in norms)


@pytest.mark.parametrize(("stem", "sizes"), [("imagenet", [16, 8, 8, 4, 2, 1]), ("cifar", [32, 32, 16, 8, 4])])
def test_resnet18_maps_have_the_sizes_of_the_spec(stem, sizes):
    model = build("resnet18", (3, 32, 32), stem=stem)
    assert isinstance(model, Backbone)
    assert isinstance(model.body, nn.Sequential)
    x, seen = torch.zeros(2, 3, 32, 32), []
    for layer in model.body:
        x = layer(x)
        if x.ndim == 4 and not isinstance(layer, (nn.GroupNorm, nn.ReLU, nn.AdaptiveAvgPool2d)):
            seen.append(x.shape[-1])
    blocks = seen[-8:]
    assert seen[:-8] + blocks[::2] == sizes
    assert blocks[::2] == blocks[1::2]


def test_resnet18_initialisation():
    model = build("resnet18", (3, 32, 32))
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            fan_out = part.out_channels * part.kernel_size[0] ** 2
            assert part.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        if isinstance(part, nn.GroupNorm):
            assert torch.equal(part.weight, torch.ones_like(part.weight))
            assert not part.bias.any()


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("feddyn-cnn", (3, 32, 32), 797_962),
        ("mcmahan-cnn", (1, 28, 28), 1_663_370),
        ("mlp", (1, 28, 28), 785 * 200 + 201 * 10),
        ("fedgen-cnn", (1, 28, 28), 26_434),
    ],
)
def test_published_sizes_of_the_plain_models(name, shape, count):
    assert parameter_count(build(name, shape)) == count


@pytest.mark.parametrize(
    ("name", "shape", "classes", "count"),
    [("fedgen-cnn", (1, 28, 28), 26, 26_962), ("fedgen-celeba-cnn", (3, 84, 84), 2, 25_954)],
)
def test_fedgen_sizes_on_other_data(name, shape, classes, count):
    assert parameter_count(build(name, shape, classes)) == count


def test_fedgen_latent_is_linear():
    features = build("fedgen-cnn", (1, 28, 28)).features(torch.randn(4, 1, 28, 28, generator=stream(1)))
    assert features.shape == (4, 32)
    assert features.min() < 0


@pytest.mark.parametrize("norm", ["gn", "bn", None])
@pytest.mark.parametrize(
    ("name", "classes", "count", "norms"),
    [
        ("resnet8", 10, 78_042, 9),
        ("resnet8", 100, 83_892, 9),
        ("resnet20", 10, 272_474, 21),
        ("resnet32", 10, 466_906, 33),
    ],
)
def test_small_resnets_have_the_sizes_of_the_spec(norm, name, classes, count, norms):
    model = build(name, (3, 32, 32), classes, norm=norm)
    assert parameter_count(model) == count
    assert len(batch_norms(model)) == (0 if norm == "gn" else norms)
    groups = [part.num_groups for part in model.modules() if isinstance(part, nn.GroupNorm)]
    assert groups == ([2] * norms if norm == "gn" else [])


def test_small_resnet_maps_and_initialisation():
    model, x, sizes = build("resnet20", (3, 32, 32)).eval(), torch.zeros(1, 3, 32, 32), []
    for layer in model.body[:-2]:
        x = layer(x)
        sizes.append((x.shape[1], x.shape[2]))
    assert sizes == [(16, 32)] * 6 + [(32, 16)] * 3 + [(64, 8)] * 3
    last = model.body[-3].conv2.weight
    assert last.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)


def test_moon_cnn_with_its_projection_has_the_published_size():
    model = build("moon-cnn", (3, 32, 32), projection=256)
    assert parameter_count(model) == 92_626
    assert parameter_count(build("moon-cnn", (1, 28, 28), projection=256)) == 92_626 - 2 * 150 - 144 * 120
    assert [tuple(part.weight.shape) for part in model.body[1:] if isinstance(part, nn.Linear)] == [(84, 84), (256, 84)]
    features = model.features(torch.randn(3, 3, 32, 32, generator=stream(1)))
    assert features.shape == (3, 256)
    assert features.min() < 0


@pytest.mark.parametrize("name", list_models())
def test_every_registered_model_takes_a_projection(name):
    shape = (1, 43, 43) if "celeba" in name else (1, 16, 16)
    if name.startswith("fedmd") and len(FEDMD_MODELS[name][0]) == 2:
        shape = (1, 4, 4)  # A linear layer as wide as their flattened map would fill the memory.
    plain, model = (build(name, shape, 7, projection=projection).eval() for projection in (None, 5))
    assert isinstance(model, Backbone)
    d = plain.head.in_features
    head = 0 if plain.head.bias is None else 1
    added = d * d + d + d * 5 + 5 + (5 + head) * 7
    assert parameter_count(model) == parameter_count(plain) - (d + head) * 7 + added
    x = torch.randn(2, *shape, generator=stream(1))
    features = model.features(x)
    assert features.shape == (2, 5)
    assert torch.equal(model.head(features), model(x))
    # The body starts from the weights it has without a projection.
    assert torch.equal(next(model.parameters()), next(plain.parameters()))


FITTING = [
    ("cnn", (1, 8, 8)),
    ("cnn", (1, 28, 28)),
    ("cnn", (3, 32, 32)),
    ("resnet18", (1, 8, 8)),
    ("resnet18", (1, 28, 28)),
    ("feddyn-cnn", (1, 28, 28)),
    ("feddyn-cnn", (3, 16, 17)),
    ("resnet8", (1, 8, 8)),
    ("resnet20", (1, 28, 28)),
    ("moon-cnn", (1, 28, 28)),
    ("moon-cnn", (3, 16, 17)),
    ("fedgen-cnn", (1, 4, 5)),
    ("fedgen-celeba-cnn", (3, 43, 50)),
    ("mcmahan-cnn", (1, 8, 8)),
    ("mcmahan-cnn", (3, 30, 32)),
    ("mlp", (1, 8, 8)),
    ("mlp", (5,)),
]


@pytest.mark.parametrize(("name", "shape"), FITTING)
def test_every_model_is_features_then_head(name, shape):
    model = build(name, shape, classes=7).eval()
    assert isinstance(model, Backbone)
    x = torch.randn(3, *shape, generator=stream(1))
    features = model.features(x)
    assert features.shape == (3, model.head.in_features)
    assert torch.equal(model.head(features), model(x))
    assert model(x).shape == (3, 7)


@pytest.mark.parametrize("norm", ["gn", "bn", "none"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_cnn_learns_a_batch_with_every_norm(norm, shape):
    model = build("cnn", shape, norm=norm, width=16)
    x, y = torch.randn(16, *shape, generator=stream(1)), torch.arange(16) % 10
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
    assert (model(x).argmax(1) == y).all()


@pytest.mark.parametrize(("width", "groups"), [(32, 8), (12, 4), (5, 1)])
def test_cnn_chooses_groups_that_divide_its_width(width, groups):
    model = build("cnn", (1, 8, 8), width=width)
    assert {m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)} == {groups}


def test_mlp_hidden_sizes():
    assert parameter_count(build("mlp", (4,), hidden=(3, 2))) == 15 + 8 + 30
    assert parameter_count(build("mlp", (4,), hidden=())) == 50


def test_weights_come_from_the_generator_alone():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = build("resnet18", (3, 32, 32)).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    second = build("resnet18", (3, 32, 32)).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    shared = stream()
    a, b = (build_model("mlp", input_shape=(4,), num_classes=3, generator=shared).state_dict() for _ in range(2))
    assert not torch.equal(a["head.weight"], b["head.weight"])


def test_list_models_has_a_summary_for_each():
    models = list_models()
    parties = [f"fedmd-{data}-{party}" for data in ("femnist", "cifar") for party in range(10)]
    plain = ["feddyn-cnn", "mcmahan-cnn", "moon-cnn", "fedgen-cnn", "fedgen-celeba-cnn", "mlp"]
    assert list(models) == ["cnn", "resnet18", "resnet8", "resnet20", "resnet32", *plain, *parties]
    assert all(summary and "\n" not in summary for summary in models.values())


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("resnet-18", (3, 32, 32), {}, "did you mean 'resnet18'"),
        ("???", (3, 32, 32), {}, "There are cnn, "),
        ("cnn", (1, 7, 8), {}, r"at least 8x8.*\(1, 7, 8\)"),
        ("cnn", (64,), {}, r"needs images \(C, H, W\)"),
        ("feddyn-cnn", (1, 8, 8), {}, "at least 16x16"),
        ("mlp", (), {}, "not empty"),
        ("mlp", (3,), {"hidden": (4, 0)}, "model.hidden"),
        ("mlp", (3,), {"norm": "bn"}, r"model.norm: model 'mlp' has no such option.*\(its options: hidden\)"),
        ("cnn", (1, 8, 8), {"stem": "cifar"}, "model.stem"),
        ("cnn", (1, 8, 8), {"width": 0}, "model.width"),
        ("cnn", (1, 8, 8), {"norm_groups": 5}, "5 groups do not divide 32"),
        ("cnn", (1, 8, 8), {"norm_groups": 0}, "0 groups do not divide 32"),
        ("cnn", (1, 8, 8), {"norm": "bn", "norm_groups": 2}, "only norm 'gn' has groups"),
        ("cnn", (1, 8, 8), {"norm": "ln"}, "model.norm: 'cnn' takes gn or bn or none"),
        ("resnet18", (3, 32, 32), {"norm": "none"}, "model.norm"),
        ("resnet8", (3, 32, 32), {"norm": "none"}, "model.norm: 'resnet8' takes gn or bn"),
        ("resnet8", (3, 32, 32), {"norm": "gn", "norm_groups": 3}, "3 groups do not divide 16"),
        ("resnet20", (3, 7, 7), {}, "'resnet20' needs images"),
        ("moon-cnn", (1, 8, 8), {}, "at least 16x16"),
        ("fedgen-celeba-cnn", (3, 42, 42), {}, "at least 43x43"),
        ("fedmd-cifar-1", (3, 8, 8), {}, "at least 12x12"),
        ("fedmd-cifar-1", (3, 32, 32), {"norm": "gn"}, "model.norm: .* has no such option"),
        ("mlp", (3,), {"projection": 0}, "model.projection: must be at least 1"),
        ("builtins:dict", (3,), {"projection": 3}, "model.projection: only registered models.*let 'builtins:dict'"),
        ("resnet18", (3, 32, 32), {"stem": "vgg"}, "model.stem: .* imagenet or cifar"),
        ("no_such_package:make", (3,), {}, "cannot import 'no_such_package:make'"),
        ("math:no_such", (3,), {}, "cannot import"),
        (":", (3,), {}, "cannot import"),
        ("math:pi", (3,), {}, "not a callable"),
        ("os.path:join", (3,), {}, "must accept the keywords"),
        ("builtins:dict", (3,), {}, "returned a dict"),
        ("builtins:dict", (3,), {"width": 3}, "model.width"),
    ],
)
def test_refusals(name, shape, options, message):
    with pytest.raises(InputError, match=message):
        build(name, shape, **options)


def test_norm_none_is_no_contradiction_for_a_model_without_norm():
    assert not batch_norms(build("mlp", (3,), norm="none"))


def test_at_least_two_classes():
    with pytest.raises(InputError, match="at least 2 classes"):
        build("mlp", (3,), classes=1)


def test_model_by_import_path(tmp_path, monkeypatch):
    (tmp_path / "users_models_1.py").write_text(
        "from torch import nn\n"
        "def make(input_shape, num_classes, depth=1):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0], num_classes))\n"
    )
    (tmp_path / "users_models_2.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    first, second = (build("users_models_1:make", (4,), classes=3) for _ in range(2))
    assert torch.equal(first[1].weight, second[1].weight)
    with pytest.raises(InputError, match="ZeroDivisionError"):
        build("users_models_2:make", (4,))
    sys.modules.pop("users_models_1")
