"""A continual-learning loop as people write it with hypnettorch, with nothing of fasthyper in it: tasks of two classes, one
after the other, a head of the output layer each, look-ahead, and the regularizer over all past tasks, as SplitMNIST in the
paper's code. The data are made up: two clouds of points a task.

python bench/split_loop.py [--tasks N] [--steps N] [--out FILE] …
python -m fasthyper.compat.hypnettorch bench/split_loop.py …                the same, accelerated
"""

import argparse
import json
import time
import warnings

import torch
import torch.nn.functional as F

warnings.filterwarnings("ignore")  # hypnettorch's own, and torch's about it

from hypnettorch.hnets import ChunkedHMLP  # noqa: E402
from hypnettorch.mnets import MLP  # noqa: E402
from hypnettorch.utils import hnet_regularizer as hreg  # noqa: E402
from hypnettorch.utils.optim_step import calc_delta_theta  # noqa: E402


def clouds(task, num_examples, num_inputs, dtype):
    """Examples of a task: its two classes are clouds that overlap a little, in twenty dimensions of the input's many."""
    generator = torch.Generator().manual_seed(1000 + task)
    centres, directions = torch.randn(2, 20, generator=generator), torch.randn(20, num_inputs, generator=generator)
    labels = torch.randint(2, (num_examples,), generator=generator)
    latent = 0.5 * centres[labels] + torch.randn(num_examples, 20, generator=generator)
    return (0.1 * latent @ directions).to(dtype), labels


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20, help="per task")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--inputs", type=int, default=784)
    parser.add_argument("--hidden", default="400,400", help="of the main network")
    parser.add_argument("--layers", default="10,10", help="of the hypernetwork")
    parser.add_argument("--chunk-size", type=int, default=42_000)
    parser.add_argument("--emb-size", type=int, default=96)
    parser.add_argument("--beta", type=float, default=0.01)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--eps", type=float, default=1e-8, help="of Adam")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", help="file for losses, accuracies and seconds of each task")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    hidden, layers = ([int(width) for width in text.split(",") if width] for text in (args.hidden, args.layers))
    mnet = MLP(args.inputs, 2 * args.tasks, hidden, no_weights=True, verbose=False)
    hnet = ChunkedHMLP(
        mnet.param_shapes,
        args.chunk_size,
        chunk_emb_size=args.emb_size,
        cond_in_size=args.emb_size,
        layers=layers,
        num_cond_embs=args.tasks,
        verbose=False,
    ).to(dtype)
    for param in hnet.unconditional_params[:-1]:  # the last are the chunk embeddings, normal as they are
        torch.nn.init.zeros_(param) if param.dim() == 1 else torch.nn.init.xavier_uniform_(param)

    losses, penalties, seconds = [], [], []
    for task in range(args.tasks):
        inputs, labels = clouds(task, 1000, args.inputs, dtype)
        theta_optimizer = torch.optim.Adam(hnet.unconditional_params, lr=args.lr, eps=args.eps)
        emb_optimizer = torch.optim.Adam([hnet.conditional_params[task]], lr=args.lr, eps=args.eps)
        targets = hreg.get_current_targets(task, hnet) if task > 0 else None
        began = time.perf_counter()
        for _ in range(args.steps):
            batch = torch.randint(len(labels), (args.batch_size,))
            theta_optimizer.zero_grad()
            emb_optimizer.zero_grad()
            outputs = mnet.forward(inputs[batch], weights=hnet.forward(cond_id=task))
            loss = F.cross_entropy(outputs[:, 2 * task : 2 * task + 2], labels[batch])
            loss.backward()
            penalty = torch.zeros(())
            if task > 0:
                delta = calc_delta_theta(theta_optimizer, False, lr=args.lr)
                penalty = hreg.calc_fix_target_reg(hnet, task, targets=targets, dTheta=delta)
                (args.beta * penalty).backward()
            theta_optimizer.step()
            emb_optimizer.step()
            losses.append(loss.item())
            penalties.append(penalty.item())
        seconds.append(time.perf_counter() - began)

    accuracies = []
    with torch.no_grad():
        for task in range(args.tasks):
            inputs, labels = clouds(task, 1000, args.inputs, dtype)
            outputs = mnet.forward(inputs, weights=hnet.forward(cond_id=task))[:, 2 * task : 2 * task + 2]
            accuracies.append((outputs.argmax(1) == labels).double().mean().item())
    print(f"{args.tasks} tasks: mean accuracy {100 * sum(accuracies) / len(accuracies):.2f} %, {sum(seconds):.1f} s")
    if args.out:
        with open(args.out, "w") as file:
            json.dump({"losses": losses, "penalties": penalties, "accuracies": accuracies, "seconds": seconds}, file)


if __name__ == "__main__":
    main()
