"""Hypernetworks of hypnettorch and hypercl become ours and go back: the same bits, the same weights, the same outputs."""

import hypercl_standin as hypercl
import oracle
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_trainer import toy_stream
from torch import nn

import fasthyper as fh
from fasthyper.activations import ACTIVATIONS
from fasthyper.compat.convert import MODULES, MainNet, as_module

SAME = {torch.float64: 1e-14, torch.float32: 1e-6}

hypnettorch = pytest.mark.filterwarnings("ignore")  # its own, from numpy and matplotlib


@pytest.fixture
def hnets():
    return pytest.importorskip("hypnettorch.hnets")


@pytest.fixture
def mnets():
    return pytest.importorskip("hypnettorch.mnets")


class Holder(nn.Module):
    """Parameters of these shapes, and nothing to do with them."""

    def __init__(self, shapes):
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(shape) for shape in shapes)


SHAPES = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=4)
OPTIONS = st.fixed_dictionaries(
    {
        "chunk_size": st.none() | st.integers(1, 40),
        "hidden": st.lists(st.integers(1, 6), max_size=3),
        "task_dim": st.integers(1, 5),
        "chunk_dim": st.integers(1, 5),
        "activation": st.sampled_from(sorted(ACTIVATIONS)),
        "dtype": st.sampled_from([torch.float32, torch.float64]),
    }
)


def make(shapes, num_tasks, **options):
    """A hypernetwork none of whose parameters is 0."""
    hnet = fh.ChunkedHypernet(Holder(shapes), num_tasks, **options)
    generator = torch.Generator().manual_seed(0)
    for parameter in hnet.parameters():
        parameter.data.normal_(generator=generator)
    return hnet


def assert_same_bits(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


def assert_same_weights(hnet, weights_of):
    for task in range(hnet.num_tasks):
        for have, want in zip(hnet.generate(task).values(), weights_of(task), strict=True):
            assert have.shape == want.shape
            assert oracle.relative_error(have.detach(), want.detach()) < 10 * SAME[have.dtype]


def assert_same_hypernet(a, b):
    assert_same_bits([*a.theta, *a.task_embeddings], [*b.theta, *b.task_embeddings])
    unused = {"seed"} | ({"chunk_dim"} if a.config["chunk_size"] is None else set())
    unused |= set() if a.config["hidden"] else {"activation"}
    assert {k: v for k, v in a.config.items() if k not in unused} == {k: v for k, v in b.config.items() if k not in unused}


@hypnettorch
@settings(max_examples=40)
@given(SHAPES, st.integers(1, 3), OPTIONS)
@example([[3, 2], [3]], 2, {"chunk_size": 4, "hidden": [], "task_dim": 2, "chunk_dim": 3, "activation": "elu"})
def test_to_hypnettorch_and_back_keeps_every_bit(hnets, shapes, num_tasks, options):
    ours = make(shapes, num_tasks, **options)
    state = torch.get_rng_state()
    peer, mnet = fh.to_hypnettorch(ours)
    assert mnet is None and torch.equal(state, torch.get_rng_state())
    assert type(peer) is (hnets.HMLP if options["chunk_size"] is None else hnets.ChunkedHMLP)
    assert_same_weights(ours, lambda task: peer.forward(cond_id=task, ret_format="sequential")[0])
    again = fh.from_hypnettorch(peer, Holder(shapes))
    assert_same_hypernet(ours, again)
    assert_same_bits(peer.internal_params, fh.to_hypnettorch(again)[0].internal_params)


@settings(max_examples=40)
@given(SHAPES, st.integers(1, 3), OPTIONS)
@example([[3, 2], [3]], 2, {"chunk_size": None, "hidden": [], "task_dim": 2, "chunk_dim": 3, "activation": "elu"})
def test_to_hypercl_and_back_keeps_every_bit(shapes, num_tasks, options):
    ours = make(shapes, num_tasks, **options)
    kind = hypercl.HyperNetwork if options["chunk_size"] is None else hypercl.ChunkedHyperNetworkHandler
    state = torch.get_rng_state()
    peer = fh.to_hypercl(ours, kind)
    assert type(peer) is kind and torch.equal(state, torch.get_rng_state())
    assert_same_weights(ours, peer.forward)
    again = fh.from_hypercl(peer, Holder(shapes))
    assert_same_hypernet(ours, again)
    assert_same_bits(peer.parameters(), fh.to_hypercl(again, kind).parameters())


@hypnettorch
def test_their_columns_and_orders(hnets):
    """Told by hand: the first layer takes [chunk, task] there and [task, chunk] here, and the bias is our last column."""
    peer = hnets.ChunkedHMLP([[2, 2]], 3, chunk_emb_size=2, cond_in_size=1, layers=(4,), num_cond_embs=2, verbose=False)
    ours = fh.from_hypnettorch(peer, Holder([[2, 2]]))
    e0, e1, w1, b1, w, b, z = peer.internal_params
    assert torch.equal(ours.trunk_weights[0], torch.cat([w1[:, 2:], w1[:, :2]], 1)) and torch.equal(ours.trunk_biases[0], b1)
    assert torch.equal(ours.basis, torch.cat([w, b[:, None]], 1)) and torch.equal(ours.chunk_embeddings, z)
    assert_same_bits(ours.task_embeddings, [e0, e1])
    w1.data.zero_()
    assert not ours.trunk_weights[0].eq(0).all(), "parameters are copied"


NETWORKS = {
    "mlp": ("MLP", {"n_in": 6, "n_out": 4, "hidden_layers": (5, 3)}, (6,)),
    "mlp, linear": ("MLP", {"n_in": 6, "n_out": 4, "hidden_layers": ()}, (6,)),
    "mlp, no bias": ("MLP", {"n_in": 6, "n_out": 4, "use_bias": False}, (6,)),
    "mlp, elu, dropout": ("MLP", {"n_in": 6, "n_out": 4, "activation_fn": nn.ELU(), "dropout_rate": 0.5}, (6,)),
    "mlp, modulated": ("MLP", {"n_in": 6, "n_out": 4, "use_context_mod": True, "context_mod_no_weights": True}, (6,)),
    "mlp, batch norm": ("MLP", {"n_in": 6, "n_out": 4, "use_batch_norm": True, "bn_track_stats": False}, (6,)),
    "mlp, out_fn": ("MLP", {"n_in": 6, "n_out": 4, "out_fn": torch.sigmoid}, (6,)),
    "resnet": ("ResNet", {"n": 1, "num_feature_maps": (2, 2, 3, 4), "bn_track_stats": False}, (3072,)),
    # of fewer maps torch 2.13 corrupts memory on the CPU, with hypnettorch alone too
    "wrn": ("WRN", {"n": 1, "k": 1, "num_feature_maps": (16, 16, 32, 64), "bn_track_stats": False}, (3072,)),
    "lenet": ("LeNet", {}, (784,)),
    "zenkenet": ("ZenkeNet", {}, (3072,)),
}


def network(mnets, name, no_weights=True):
    kind, options, shape = NETWORKS[name]
    torch.manual_seed(0)
    mnet = getattr(mnets, kind)(**options, no_weights=no_weights, verbose=False)
    return mnet, torch.rand(3, *shape)


def peer_for(hnets, mnet, num_conds=2):
    options = {"chunk_emb_size": 3, "cond_in_size": 4, "layers": (5,), "num_cond_embs": num_conds, "verbose": False}
    return hnets.ChunkedHMLP(mnet.param_shapes, 900, **options)


@hypnettorch
@pytest.mark.parametrize("no_weights", [True, False], ids=["no weights", "weights of its own"])
@pytest.mark.parametrize("name", NETWORKS)
def test_targets_have_the_same_outputs_and_gradients(hnets, mnets, name, no_weights):
    mnet, x = network(mnets, name, no_weights)
    peer = peer_for(hnets, mnet)
    ours = fh.from_hypnettorch(peer, mnet)
    assert [list(shape) for shape in ours.target.shapes] == [list(shape) for shape in mnet.param_shapes]
    assert isinstance(ours.target.module, fh.nets.MLP) == (name in ("mlp", "mlp, linear", "mlp, no bias"))
    for module in (ours, peer, mnet):
        module.eval()
    theirs = mnet.forward(x, weights=peer.forward(cond_id=1))
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    assert oracle.relative_error(ours(x, 1).detach(), theirs.detach()) < 1e-5
    theirs.sum().backward()
    ours(x, 1).sum().backward()
    for have, want in zip([ours.basis.grad[:, -1], ours.embedding(1).grad], [peer.internal_params[-2].grad,
                          peer.conditional_params[1].grad], strict=True):  # fmt: skip
        assert oracle.relative_error(have, want) < 1e-4
    back, its_network = fh.to_hypnettorch(ours)
    assert type(its_network) is type(mnet)
    again = its_network.eval().forward(x, weights=back.forward(cond_id=1))
    assert torch.equal(again[0] if isinstance(again, tuple) else again, theirs)


@hypnettorch
def test_dropout_of_the_target_follows_training_mode(hnets, mnets):
    mnet, x = network(mnets, "mlp, elu, dropout")
    ours = fh.from_hypnettorch(peer_for(hnets, mnet), mnet)
    assert not torch.equal(ours.train()(x, 0), ours(x, 0))
    assert torch.equal(ours.eval()(x, 0), ours(x, 0))


@hypnettorch
def test_heads_are_slices_of_the_outputs(hnets, mnets):
    mnet, x = network(mnets, "mlp, elu, dropout")
    peer = peer_for(hnets, mnet)
    ours = fh.from_hypnettorch(peer, mnet, outputs_per_task=2).eval()
    theirs = mnet.eval().forward(x, weights=peer.forward(cond_id=1))[:, 2:4]
    assert torch.allclose(ours(x, 1), theirs, rtol=1e-5, atol=1e-6)
    assert len(ours.target.heads) == 2
    with pytest.raises(ValueError, match="does not divide"):
        fh.from_hypnettorch(peer, mnet, outputs_per_task=3)


@hypnettorch
def test_a_converted_hypernetwork_trains_saves_and_exports(hnets, mnets, tmp_path):
    from safetensors.torch import load_file

    mnet = mnets.MLP(n_in=6, n_out=4, activation_fn=nn.Tanh(), no_weights=True, verbose=False)
    ours = fh.from_hypnettorch(peer_for(hnets, mnet), mnet)
    trainer = fh.Trainer(ours, progress=False, out=tmp_path / "run")
    for task in toy_stream(2):
        trainer.fit(task, steps=3, batch_size=8)
    with pytest.raises(fh.CheckpointError, match="MainNet is not one of fasthyper.nets: pass it as target="):
        fh.load(tmp_path / "run")
    loaded = fh.load(tmp_path / "run", target=as_module(mnet))
    assert_same_hypernet(ours, loaded)
    peer, _ = fh.to_hypnettorch(loaded)
    ours.export(tmp_path / "task.safetensors", task=1)
    plain, x = as_module(mnet), torch.rand(3, 6)
    plain.load_state_dict(load_file(tmp_path / "task.safetensors"))
    assert torch.allclose(plain(x), mnet.forward(x, weights=peer.forward(cond_id=1)), rtol=1e-5, atol=1e-6)


class Odd(nn.Module):
    def forward(self, x):
        return nn.functional.leaky_relu(x)


@hypnettorch
@pytest.mark.parametrize(
    ("kind", "options", "line"),
    [
        ("ChunkedHMLP", {"cond_chunk_embs": True}, "nothing like its option cond_chunk_embs"),
        ("ChunkedHMLP", {"uncond_in_size": 2}, "nothing like its option uncond_in_size"),
        ("HMLP", {"uncond_in_size": 2}, "nothing like its option uncond_in_size"),
        ("ChunkedHMLP", {"dropout_rate": 0.2}, "nothing like its option dropout_rate"),
        ("HMLP", {"dropout_rate": 0.2}, "nothing like its option dropout_rate"),
        ("ChunkedHMLP", {"use_bias": False}, "nothing like its option use_bias=False"),
        ("HMLP", {"use_batch_norm": True}, "nothing like its option use_batch_norm"),
        ("HMLP", {"no_uncond_weights": True, "no_cond_weights": True}, "nothing like its option no_uncond_weights"),
        ("HMLP", {"num_cond_embs": 0}, "nothing like its option num_cond_embs=0"),
        ("HMLP", {"activation_fn": Odd()}, "activation_fn=Odd() has no counterpart here; choose from relu, elu"),
        ("HMLP", {"activation_fn": None}, "activation_fn=None has no counterpart here"),
        ("HMLP", {"activation_fn": nn.ELU(2.0)}, "activation_fn=ELU(alpha=2.0) has no counterpart here"),
    ],
    ids=str,
)
def test_what_hypnettorch_has_and_we_do_not_is_named(hnets, kind, options, line):
    arguments = [[[3, 2], [3]], *([4] if kind == "ChunkedHMLP" else [])]
    peer = getattr(hnets, kind)(*arguments, **{"num_cond_embs": 2, "verbose": False, **options})
    with pytest.raises(ValueError) as caught:
        fh.from_hypnettorch(peer, Holder([[3, 2], [3]]))
    assert line in str(caught.value) and "\n" not in str(caught.value)


@hypnettorch
def test_other_hypernetworks_networks_and_types_are_refused(hnets, mnets):
    peer = hnets.HMLP([[3, 2], [3]], verbose=False)

    class Mine(hnets.HMLP):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    with pytest.raises(ValueError, match="HPerturbWrapper has no counterpart here"):
        fh.from_hypnettorch(hnets.HPerturbWrapper(peer, hnet_uncond_in_size=0, verbose=False), Holder([[3, 2], [3]]))
    with pytest.raises(ValueError, match="Mine has no counterpart here"):
        fh.from_hypnettorch(Mine([[3, 2], [3]], verbose=False), Holder([[3, 2], [3]]))
    with pytest.raises(ValueError, match="generates tensors of shapes .*, the target has"):
        fh.from_hypnettorch(peer, Holder([[2, 3], [3]]))
    with pytest.raises(ValueError, match="running batch-norm statistics, .* bn_track_stats=False"):
        as_module(mnets.MLP(use_batch_norm=True, verbose=False))
    with pytest.raises(ValueError, match="of torch.bfloat16; make it float32"):
        fh.from_hypnettorch(peer.bfloat16(), Holder([[3, 2], [3]]))
    with pytest.raises(ValueError, match="only layout='flat' can, not 'aligned'"):
        fh.to_hypnettorch(fh.ChunkedHypernet(fh.nets.MLP(4, (), 3), 1, chunk_size=8, layout="aligned"))
    with pytest.raises(ValueError, match="parameters it does not generate"):
        fh.to_hypnettorch(fh.ChunkedHypernet(fh.nets.MLP(4, (5,), 3), 1, chunk_size=8, generate="*weight"))


@pytest.mark.parametrize("chunked", [True, False])
def test_hypercl_networks_have_the_same_outputs(chunked):
    torch.manual_seed(1)
    mnet, x = hypercl.MainNetwork(), torch.rand(3, 4)
    options = {"layers": [5, 4], "te_dim": 3, "activation_fn": nn.Sigmoid()}
    if chunked:
        peer = hypercl.ChunkedHyperNetworkHandler(mnet.param_shapes, 3, chunk_dim=20, ce_dim=2, **options)
    else:
        peer = hypercl.HyperNetwork(mnet.param_shapes, 3, **options)
    ours = fh.from_hypercl(peer, mnet, outputs_per_task=2)
    assert isinstance(ours.target.module, MainNet) and ours.config["activation"] == "sigmoid"
    assert torch.allclose(ours(x, 2), mnet.forward(x, weights=peer.forward(2))[:, 4:], rtol=1e-5, atol=1e-6)
    assert torch.equal(fh.from_hypercl(peer, mnet, activation="sigmoid")(x, 2), fh.from_hypercl(peer, mnet)(x, 2))
    with pytest.raises(ValueError, match="it generates other weights"):
        fh.from_hypercl(peer, mnet, activation="relu")
    for module in peer.modules():
        vars(module).pop("_act_fn", None), module._modules.pop("_act_fn", None)
    with pytest.raises(ValueError, match="pass activation="):
        fh.from_hypercl(peer, mnet)


@pytest.mark.parametrize(
    ("kind", "options", "line"),
    [
        ("ChunkedHyperNetworkHandler", {"ce_dim": 3, "noise_dim": 2}, "nothing like its option noise_dim"),
        ("HyperNetwork", {"noise_dim": 2}, "nothing like its option noise_dim"),
        ("ChunkedHyperNetworkHandler", {"ce_dim": 3, "dropout_rate": 0.2}, "nothing like its option dropout_rate"),
        ("ChunkedHyperNetworkHandler", {"ce_dim": 3, "use_bias": False}, "nothing like its option use_bias=False"),
        ("HyperNetwork", {"use_bias": False}, "nothing like its option use_bias=False"),
        ("HyperNetwork", {"no_te_embs": True}, "nothing like its option no_te_embs"),
        ("HyperNetwork", {"no_weights": True}, "nothing like its option no_weights"),
        ("HyperNetwork", {"ce_dim": 2}, "nothing like its option ce_dim"),
        ("HyperNetwork", {"activation_fn": Odd()}, "activation_fn=Odd() has no counterpart here"),
    ],
    ids=str,
)
def test_what_hypercl_has_and_we_do_not_is_named(kind, options, line):
    peer = getattr(hypercl, kind)([[3, 2], [3]], 2, **options)
    with pytest.raises(ValueError) as caught:
        fh.from_hypercl(peer, Holder([[3, 2], [3]]))
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_hypercl_parameters_in_another_order_are_refused():
    class Reordered(hypercl.HyperNetwork):
        @property
        def theta(self):
            return super().theta[::-1]

    with pytest.raises(ValueError, match="are not weight and bias of each layer"):
        fh.from_hypercl(Reordered([[3, 2], [3]], 2, layers=[5]), Holder([[3, 2], [3]]))
    full = fh.ChunkedHypernet(fh.nets.MLP(4, (), 3), 1, chunk_size=None)
    with pytest.raises(ValueError, match="do not fit into"):
        fh.to_hypercl(full, Reordered)
    with pytest.raises(ValueError, match="only layout='flat' can"):
        fh.to_hypercl(fh.ChunkedHypernet(fh.nets.MLP(4, (), 3), 1, chunk_size=8, layout="aligned"), hypercl.HyperNetwork)


def test_every_activation_has_a_module():
    assert set(MODULES) == set(ACTIVATIONS)
