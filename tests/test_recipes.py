"""The recipes are the papers' configurations; measured results are told from the recipes' own settings."""

import pytest

from fasthyper.recipes import RECIPES
from fasthyper.recipes.run import build, build_replay

# inputs, classes, generated weights, chunks, parameters of the hypernetwork with all task embeddings: as in the paper's code
SIZES = {
    "toy-regression": (1, 1, 141, 1, 1_697),
    "split-mnist-cl1-ent": (784, 2, 478_410, 12, 465_672),
    "split-mnist-cl2-tir": (784, 2, 475_202, 12, 465_672),
    "split-mnist-cl3-ent": (784, 2, 478_410, 12, 465_672),
    "permuted-mnist-10-cl1-ent": (1024, 10, 2_126_100, 28, 2_029_939),
    "permuted-mnist-10-cl2-ent": (1024, 10, 2_036_010, 27, 2_029_931),
    "permuted-mnist-100": (1024, 10, 3_027_000, 404, 2_816_448),
    "permuted-mnist-250": (1024, 10, 4_528_500, 378, 4_414_836),
    "split-cifar-10-100-resnet32": (3072, 10, 468_540, 67, 457_336),
    "split-cifar-10-100-zenke": (3072, 10, 1_276_508, 233, 1_182_678),
}
REPLAY_SIZES = {  # inputs, generated weights of a decoder, chunks
    "split-mnist-cl3-tir": (784, 136_084, 3),
    "split-mnist-cl3-r": (784, 413_284, 9),
    "permuted-mnist-10-cl3-tir": (1024, 2_227_024, 27),
    "permuted-mnist-10-cl3-r": (1024, 651_424, 8),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_those_of_the_papers_code(name):
    num_inputs, num_classes, num_weights, num_chunks, num_parameters = SIZES[name]
    hnet = build(RECIPES[name], num_inputs, num_classes)
    assert (hnet.target.num_weights, hnet.layout.num_chunks) == (num_weights, num_chunks)
    assert sum(p.numel() for p in hnet.parameters() if p.requires_grad) == num_parameters


@pytest.mark.parametrize("name", REPLAY_SIZES)
def test_decoders_are_those_of_the_papers_code(name):
    num_inputs, num_weights, num_chunks = REPLAY_SIZES[name]
    hnet = build_replay(RECIPES[name], num_inputs)
    assert (hnet.target.num_weights, hnet.layout.num_chunks) == (num_weights, num_chunks)
    assert hnet.num_tasks == RECIPES[name].num_tasks - 1
