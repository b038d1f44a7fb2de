"""Images: normalised, cropped and mirrored as a loop over single images would; the same from run to run."""

import pytest
import torch
from emulated_graph import EmulatedGraphs
from hypothesis import given
from hypothesis import strategies as st

import fasthyper as fh
from fasthyper import graph, nets
from fasthyper.streams import ImageData, Task
from fasthyper.streams.batches import Batches
from fasthyper.streams.images import crop_and_flip, moments

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])


def pixels(n, *shape, seed=0):
    return torch.randint(0, 256, (n, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def some_images(n=24, *, padding=4, size=32, seed=0):
    return ImageData(pixels(n, 3, size, size, seed=seed), torch.arange(n) % 2, mean=MEAN, std=STD, padding=padding)


def cut(image, top, left, flip, padding):
    """Pixel by pixel."""
    _, height, width = image.shape
    result = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            row, column = top + y - padding, left + (width - 1 - x if flip else x) - padding
            if 0 <= row < height and 0 <= column < width:
                result[:, y, x] = image[:, row, column]
    return result


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    padding=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_crop_and_flip_equals_a_loop_over_pixels(shape, padding, seed):
    generator = torch.Generator().manual_seed(seed)
    images = pixels(5, *shape, seed=seed)
    top, left = torch.randint(2 * padding + 1, (2, 5), generator=generator)
    flip = torch.randint(2, (5,), generator=generator)
    cuts = zip(images, top.tolist(), left.tolist(), flip.tolist(), strict=True)
    expected = torch.stack([cut(image, *drawn, padding) for image, *drawn in cuts])
    assert torch.equal(crop_and_flip(images, top, left, flip, padding=padding), expected)


def test_a_window_in_the_middle_is_the_image_itself():
    images, four = pixels(3, 3, 8, 8), torch.full((3,), 4)
    assert torch.equal(crop_and_flip(images, four, four, torch.zeros(3, dtype=torch.int64), padding=4), images)
    assert torch.equal(crop_and_flip(images, four, four, torch.ones(3, dtype=torch.int64), padding=4), images.flip(3))


def test_batches_are_augmented_where_they_are_trained_on_only():
    data = some_images()
    batches = Batches(24, 8, seed=3, task=1, choices=data.choices)
    drawn = batches.indices(2)
    (x, y), (plain, _) = data.batch(drawn), data.batch(drawn[:, 0])
    for i, (example, top, left, flip) in enumerate(drawn.tolist()):
        for image, found in ((cut(data.inputs[example], top, left, flip, 4), x[i]), (data.inputs[example], plain[i])):
            expected = (image.double() / 255 - MEAN.double()[:, None, None]) / STD.double()[:, None, None]
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
        assert y[i] == example % 2
    assert ImageData(data.inputs, data.labels, mean=MEAN, std=STD).choices == ()


def test_what_is_drawn_is_evenly_spread_and_a_function_of_seed_task_and_step():
    def draw(step, seed=3, task=1, choices=(9, 9, 2)):
        return Batches(2000, 500, seed=seed, task=task, choices=choices).indices(step)

    epoch = torch.cat([draw(step) for step in range(4)])
    assert torch.equal(epoch[:, 0].sort().values, torch.arange(2000))
    for column, ways in ((1, 9), (2, 9), (3, 2)):
        share = epoch[:, column].bincount(minlength=ways) * ways / 2000
        assert len(share) == ways and share.min() > 0.75 and share.max() < 1.25
    assert torch.equal(draw(6), draw(6))
    for other in (draw(10), draw(6, seed=4), draw(6, task=2)):
        assert not torch.equal(other[:, 1:], draw(6)[:, 1:])
    assert torch.equal(draw(6, choices=()), draw(6)[:, 0])  # the examples are those of a stream that draws nothing


def test_moments_are_those_of_the_pixels():
    images = pixels(7, 3, 5, 4) // torch.tensor([1, 2, 3])[:, None, None]
    mean, std = moments(images.byte())
    values = images.double().transpose(0, 1).flatten(1) / 255
    torch.testing.assert_close(mean, values.mean(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(std, values.std(1, correction=0), rtol=1e-12, atol=0)


def test_views_share_images_here_and_elsewhere():
    data = some_images()
    views = [data.view(torch.arange(start, 24, 2), torch.full((12,), start)) for start in (1, 0)]
    assert all(view.inputs is data.inputs and len(view) == 12 and view.shape == (12, 3, 32, 32) for view in views)
    x, y = views[0].batch(torch.tensor([2, 0]))
    assert torch.equal(x, data.batch(torch.tensor([5, 1]))[0]) and y.tolist() == [1, 1]
    part = views[0].view(torch.tensor([3]), torch.tensor([7]))
    assert torch.equal(part.batch(torch.tensor([0]))[0], data.batch(torch.tensor([7]))[0]) and part.labels.tolist() == [7]
    moved = [view.to("meta") for view in views]
    assert moved[0].inputs is moved[1].inputs and moved[0].device.type == moved[0].labels.device.type == "meta"
    assert moved[0] is views[0].to("meta") and views[0].to("cpu") is views[0] and data.to("cpu") is data


def test_images_keep_their_rows_where_a_stream_relabels_them():
    data = some_images()
    part = data.view(torch.tensor([5, 2, 9]), torch.tensor([7, 4, 7]))
    (task,) = fh.streams.from_datasets([(part, part)], relabel=True)
    x, y = task.train.batch(torch.tensor([0, 1]))
    assert torch.equal(x, data.batch(torch.tensor([5, 2]))[0]) and y.tolist() == [1, 0]
    assert task.train.choices == (9, 9, 2) and task.num_classes == 2


def test_image_data_refuses():
    images, labels = pixels(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
    for wrong in ((images.float(), labels), (images[0], labels[:3]), (images, labels[:3]), (images, labels.float())):
        with pytest.raises(ValueError, match=r"inputs must be uint8 \[n, C, height, width\] and labels int64 \[n\], got"):
            ImageData(*wrong, mean=MEAN, std=STD)
    with pytest.raises(TypeError, match="pixels of ImageData cannot be permuted"):
        some_images().share()


def small_trainer(device="cpu", graph=None, **options):
    net = nets.ResNet(4, n=1, widths=(4, 4, 5, 6), running_stats=True)
    hnet = fh.ChunkedHypernet(net, 2, chunk_size=300, task_dim=4, chunk_dim=3, outputs_per_task=2)
    return fh.Trainer(hnet, lr=0.01, beta=0.1, progress=False, device=device, graph=graph, **options)


def small_tasks():
    return [Task(i, some_images(seed=i), some_images(padding=None, seed=10 + i), 2) for i in range(2)]


def same(a, b, **tolerance):
    for x, y in zip(a.hnet.state_dict().values(), b.hnet.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, **tolerance)


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path):
    whole, first = small_trainer(), small_trainer()
    for task in small_tasks():
        whole.fit(task, steps=7, batch_size=8)
    tasks = small_tasks()
    first.fit(tasks[0], steps=7, batch_size=8)
    first.begin_task(steps=7)
    batches = Batches(24, 8, seed=first.seed, task=1, choices=tasks[1].train.choices)
    for step in range(4):  # into the second epoch
        first.step(*tasks[1].train.batch(batches.indices(step)))
    first.save(tmp_path / "run")
    resumed = fh.Trainer.load(tmp_path / "run", progress=False)
    resumed.fit(tasks[1], steps=7, batch_size=8)
    same(whole, resumed, rtol=0, atol=0)
    losses = [[loss for _, loss in trainer.results.tasks[1].loss] for trainer in (whole, resumed)]
    assert losses[0][4:] == losses[1][-3:] and len(set(losses[0])) == 7


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_augmented_steps_are_captured(device, monkeypatch):
    if device == "cpu":
        monkeypatch.setitem(graph.RUNTIMES, "cpu", EmulatedGraphs)
    runs = [small_trainer(device, captured) for captured in (None, False)]
    for trainer in runs:
        for task in small_tasks():
            trainer.fit(task, steps=12, batch_size=8)
    if device == "cpu":
        assert runs[0]._runtime.captures == 2 and runs[0]._runtime.replays == 2 * (12 - 1 - graph.WARM_UP)
        same(*runs, rtol=0, atol=0)
    else:
        same(*runs, rtol=1e-3, atol=1e-5)


def test_augmentation_changes_what_is_learned_and_not_what_is_evaluated():
    plain, augmented = (Task(0, some_images(padding=padding), some_images(padding=padding), 2) for padding in (None, 4))
    runs = [small_trainer(), small_trainer()]
    for trainer, task in zip(runs, (plain, augmented), strict=True):
        trainer.fit(task, steps=3, batch_size=8)
    assert not torch.equal(runs[0].hnet.basis, runs[1].hnet.basis)
    runs[1].hnet.eval()
    x, y = plain.test.batch(torch.arange(24))
    share = (runs[1].hnet(x, 0).argmax(1) == y).float().mean().item()
    assert runs[1].evaluate(augmented) == [pytest.approx(share)]
