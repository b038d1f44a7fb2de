"""Target networks: sizes, shapes, the outputs of hypnettorch's, how a checkpoint names them."""

import copy

import oracle
import pytest
import torch

import fasthyper as fh
from fasthyper import nets

SMALL = {
    "MLP": lambda: nets.MLP(3 * 32 * 32, (20, 10), 6),
    "LeNet": lambda: nets.LeNet(6, arch="mnist_small"),
    "ZenkeNet": lambda: nets.ZenkeNet(6, dropout=0.0),
    "ResNet": lambda: nets.ResNet(6, n=1, widths=(4, 4, 6, 9)),
    "WRN": lambda: nets.WRN(6, n=1, k=2, widths=(4, 2, 3, 5)),
}


def images(name, batch=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    shape = (1, 28, 28) if name == "LeNet" else (3, 32, 32)
    return torch.randn(batch, *shape, generator=generator, dtype=dtype)


def size(make, *args, **options):
    with torch.device("meta"):
        return sum(p.numel() for p in make(*args, **options).parameters())


@pytest.mark.parametrize(
    ("make", "options", "weights"),
    [
        (nets.LeNet, {"arch": "mnist_small"}, 21_840),
        (nets.LeNet, {"arch": "mnist_large"}, 431_080),
        (nets.LeNet, {"arch": "cifar"}, 5_747_394),
        (nets.ZenkeNet, {"num_outputs": 60}, 1_276_508),
        (nets.resnet32, {"num_outputs": 60}, 468_540),
        # He et al. have no biases before norms: 0.27, 0.46 and 0.85 million; Zagoruyko and Komodakis neither: 36.5 million
        (nets.resnet20, {"bias": False}, 269_722),
        (nets.resnet32, {"bias": False}, 464_154),
        (nets.resnet56, {"bias": False}, 853_018),
        (nets.wrn_28_10, {"bias": False}, 36_479_194),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_net_has_the_published_number_of_weights(make, options, weights):
    assert size(make, **options) == weights


@pytest.mark.parametrize("name", SMALL)
def test_net_runs_forward_and_backward(name):
    net = SMALL[name]()
    out = net(images(name))
    assert out.shape == (4, 6)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_net_is_a_target_and_is_rebuilt_from_a_checkpoint(name, tmp_path):
    net = SMALL[name]()
    x, y = images(name, 8), torch.arange(8) % 6
    hnet = fh.ChunkedHypernet(net, 2, chunk_size=9000, task_dim=5, chunk_dim=3)
    trainer = fh.Trainer(hnet, progress=False)
    for _ in range(2):
        trainer.fit((x, y), steps=1, batch_size=4)
    trainer.save(tmp_path / "run")
    again = fh.Trainer.load(tmp_path / "run", progress=False)
    hnet.eval(), again.hnet.eval()
    assert torch.equal(again.hnet(x, 0), hnet(x, 0))
    rebuilt = nets.build(nets.describe(net))
    assert type(rebuilt) is type(net) and rebuilt.config == net.config
    assert [p.shape for p in rebuilt.parameters()] == [p.shape for p in net.parameters()]


@pytest.mark.parametrize("size", [32, 9])
def test_residual_nets_take_images_of_any_size(size):
    x = torch.randn(3, 2, size, size)
    assert nets.ResNet(7, n=1, widths=(4, 6, 6, 9), num_channels=2)(x).shape == (3, 7)
    assert nets.WRN(7, n=1, k=1, widths=(4, 4, 6, 9), num_channels=2)(x).shape == (3, 7)


def test_shortcuts_of_a_wrn_are_where_a_block_changes_its_shape_and_may_be_activated():
    net = nets.WRN(6, n=1, k=1, widths=(4, 4, 4, 6))
    assert [type(shortcut).__name__ for shortcut in net.shortcuts] == ["Identity", "Conv2d", "Conv2d"]
    other = nets.WRN(6, n=1, k=1, widths=(4, 4, 4, 6), activated_shortcut=True)
    other.load_state_dict(net.state_dict())
    assert not torch.allclose(net(images("WRN")), other(images("WRN")))


@pytest.mark.parametrize("name", ["LeNet", "ZenkeNet", "WRN"])
def test_dropout_acts_in_training_only(name):
    config = SMALL[name]().config
    net, x = getattr(nets, name)(**{**config, "dropout": 0.3}), images(name)
    assert not torch.equal(net(x), net(x))
    assert torch.equal(net.eval()(x), net(x))


def test_nets_name_what_is_wrong():
    with pytest.raises(ValueError, match="four numbers, none smaller"):
        nets.ResNet(4, widths=(16, 8, 8, 8))
    with pytest.raises(ValueError, match="four numbers, got"):
        nets.WRN(4, widths=(16, 8, 8))
    with pytest.raises(ValueError, match="unknown LeNet 'big'; choose from mnist_small"):
        nets.LeNet(arch="big")
    with pytest.raises(ValueError, match="dropout must be in"):
        nets.ZenkeNet(dropout=0.6)
    with pytest.raises(ValueError, match="not one of fasthyper.nets"):
        nets.build(nets.describe(torch.nn.Linear(2, 2)))


# hypnettorch's nets take flattened images, channels last.


@pytest.fixture
def peers(monkeypatch):
    pytest.importorskip("hypnettorch")
    from hypnettorch.mnets.lenet import LeNet
    from hypnettorch.mnets.resnet import ResNet
    from hypnettorch.mnets.wide_resnet import WRN
    from hypnettorch.mnets.zenkenet import ZenkeNet

    # with other than ten classes both write into lists of their class
    monkeypatch.setattr(LeNet, "_ARCHITECTURES", copy.deepcopy(LeNet._ARCHITECTURES))
    monkeypatch.setattr(ZenkeNet, "_architectures", copy.deepcopy(ZenkeNet._architectures))
    return {"LeNet": LeNet, "ZenkeNet": ZenkeNet, "ResNet": ResNet, "WRN": WRN}


PEER_OPTIONS = {
    "LeNet": {"arch": "mnist_small"},
    "ZenkeNet": {"dropout_rate": -1},
    "ResNet": {"n": 1, "num_feature_maps": (4, 4, 6, 9)},
    "WRN": {"n": 1, "k": 2, "num_feature_maps": (4, 2, 3, 5)},
}


@pytest.mark.filterwarnings("ignore")  # hypnettorch's own
@pytest.mark.parametrize("running_stats", [False, True], ids=["", "running"])
@pytest.mark.parametrize("name", PEER_OPTIONS)
def test_net_has_the_shapes_and_outputs_of_hypnettorch(name, running_stats, peers):
    options, net = PEER_OPTIONS[name], SMALL[name]()
    if "running_stats" in net.config:
        options = {**options, "bn_track_stats": running_stats}
        net = type(net)(**{**net.config, "running_stats": running_stats})
    peer = peers[name](num_classes=6, verbose=False, **options).double()
    assert [list(p.shape) for p in net.parameters()] == [list(shape) for shape in peer.param_shapes]
    net = net.double()
    generator = torch.Generator().manual_seed(1)
    weights = [0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in net.parameters()]
    for p, weight in zip(net.parameters(), weights, strict=True):
        p.data = weight
    x = images(name, dtype=torch.float64)
    for training in (True, False):  # in training, running statistics move
        net.train(training), peer.train(training)
        have, want = net(x), peer.forward(x.permute(0, 2, 3, 1).flatten(1), weights=weights)
        assert oracle.relative_error(have.detach(), want.detach()) < 1e-12


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "options", "make"),
    [
        ("ResNet", {"n": 3}, nets.resnet20),
        ("ResNet", {"n": 5}, nets.resnet32),
        ("ResNet", {"n": 9}, nets.resnet56),
        ("WRN", {}, nets.wrn_28_10),
        ("LeNet", {"arch": "mnist_large"}, nets.LeNet),
        ("ZenkeNet", {}, nets.ZenkeNet),
    ],
    ids=["resnet20", "resnet32", "resnet56", "wrn_28_10", "LeNet", "ZenkeNet"],
)
def test_whole_net_has_as_many_weights_as_hypnettorchs(name, options, make, peers):
    assert size(make) == peers[name](no_weights=True, verbose=False, **options).num_params
