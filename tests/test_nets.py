"""Target networks: sizes, shapes, how a checkpoint names them."""

import pytest
import torch

import fasthyper as fh


def test_resnet_has_the_parameters_of_the_papers_experiment():
    net = fh.nets.ResNet(60)
    assert sum(p.numel() for p in net.parameters()) == 468_540
    assert len(list(net.parameters())) == 126
    assert sum(p.numel() for p in fh.nets.ResNet(60, bias=False).parameters()) == 468_540 - 1136


@pytest.mark.parametrize("size", [32, 9])
def test_resnet_runs_forward_and_backward(size):
    net = fh.nets.ResNet(7, n=1, widths=(4, 6, 6, 9), num_channels=2)
    out = net(torch.randn(3, 2, size, size))
    assert out.shape == (3, 7)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_resnet_is_a_target_and_is_described_and_built(tmp_path):
    net = fh.nets.ResNet(4, n=1, widths=(4, 4, 4, 8))
    hnet = fh.ChunkedHypernet(net, 2, chunk_size=100, task_dim=5, chunk_dim=3)
    x, y = torch.randn(8, 3, 12, 12), torch.arange(8) % 4
    trainer = fh.Trainer(hnet, progress=False)
    for _ in range(2):
        trainer.fit((x, y), steps=2, batch_size=4)
    trainer.save(tmp_path / "run")
    again = fh.Trainer.load(tmp_path / "run", progress=False)
    hnet.eval(), again.hnet.eval()
    assert torch.equal(again.hnet(x, 0), hnet(x, 0))
    with pytest.raises(ValueError, match="four numbers, none smaller"):
        fh.nets.ResNet(4, widths=(16, 8, 8, 8))
