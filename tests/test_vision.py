"""Networks of torchvision as targets."""

import importlib.util
import subprocess
import sys

import pytest
import torch

import fasthyper as fh
from fasthyper.vision import torchvision

installed = importlib.util.find_spec("torchvision") is not None
needs_torchvision = pytest.mark.skipif(not installed, reason="torchvision is not installed: pip install 'fasthyper[vision]'")


@pytest.mark.skipif(installed, reason="torchvision is installed")
def test_missing_torchvision_is_named_with_the_mending():
    with pytest.raises(ImportError, match=r"pip install 'fasthyper\[vision\]'"):
        torchvision()


@needs_torchvision
def test_trouble_is_named_where_a_plain_import_fails():
    plain = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True)
    said = subprocess.run(
        [sys.executable, "-c", "from fasthyper import vision; print(vision.trouble())"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("built for another torch" in said.stdout) == (plain.returncode != 0)


@needs_torchvision
@pytest.mark.parametrize(
    "norm",
    [
        lambda width: torch.nn.GroupNorm(8, width),
        lambda width: torch.nn.BatchNorm2d(width, track_running_stats=False),
    ],
    ids=["group norm", "batch norm"],
)
def test_resnet18_is_a_target(norm):
    net = torchvision().models.resnet18(num_classes=6, norm_layer=norm)
    shapes = {name: p.shape for name, p in net.named_parameters()}
    hnet = fh.ChunkedHypernet(net, 3, chunk_size=150_000, task_dim=8, chunk_dim=8, outputs_per_task=2)
    assert {name: weight.shape for name, weight in hnet.generate(1).items()} == shapes
    regularizer = fh.OutputRegularizer(hnet)
    regularizer.snapshot(1)
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    loss = torch.nn.functional.cross_entropy(hnet(x, 1), y) + regularizer.penalty()
    loss.backward()
    assert loss.isfinite() and hnet.basis.grad.isfinite().all() and hnet.basis.grad.any()
