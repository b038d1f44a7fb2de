"""What we know of hypercl, which is on no index: constructors, attributes, parameter order, forward of hypernetworks."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class HyperNetwork(nn.Module):
    """One linear head for each target tensor; the input is [task embedding, external input]."""

    def __init__(
        self, target_shapes, num_tasks, layers=(50, 100), verbose=True, te_dim=8, no_te_embs=False, activation_fn=None,
        use_bias=True, no_weights=False, ce_dim=None, dropout_rate=-1, noise_dim=-1,
    ):  # fmt: skip
        super().__init__()
        self.target_shapes, self.num_task_embs, self.requires_ext_input = target_shapes, num_tasks, ce_dim is not None
        self.has_theta, self.has_task_embs = not no_weights, not no_te_embs
        self._act_fn = activation_fn or nn.ReLU()
        self._dropout = nn.Dropout(dropout_rate) if dropout_rate != -1 else None
        self._noise_dim, self._use_bias, self._num_layers = max(noise_dim, 0), use_bias, len(layers)
        widths = [te_dim + (ce_dim or 0) + self._noise_dim, *layers]
        shapes = [[o, i] for i, o in zip(widths, layers, strict=False)]
        shapes += [[math.prod(shape), widths[-1]] for shape in target_shapes]
        self.theta_shapes = [s for shape in shapes for s in (shape, shape[:1])[: 1 + use_bias]]
        self._theta = nn.ParameterList(torch.randn(*shape) * 0.3 for shape in self.theta_shapes)
        self._task_embs = nn.ParameterList(torch.randn(te_dim) for _ in range(num_tasks if self.has_task_embs else 0))

    @property
    def theta(self):
        return list(self._theta)

    def get_task_embs(self):
        return list(self._task_embs)

    def get_task_emb(self, task_id):
        return self._task_embs[task_id]

    def forward(self, task_id=None, theta=None, dTheta=None, task_emb=None, ext_inputs=None, squeeze=True):
        theta = self.theta if theta is None else theta
        theta = theta if dTheta is None else [p + d for p, d in zip(theta, dTheta, strict=True)]
        x = (self._task_embs[task_id] if task_emb is None else task_emb).view(1, -1)
        if ext_inputs is not None:
            x = torch.cat([x.expand(len(ext_inputs), -1), ext_inputs], 1)
        x = torch.cat([x, x.new_zeros(len(x), self._noise_dim)], 1)
        layers = list(zip(theta[::2], theta[1::2], strict=True)) if self._use_bias else [(w, None) for w in theta]
        for weight, bias in layers[: self._num_layers]:
            x = self._act_fn(F.linear(x, weight, bias))
            x = x if self._dropout is None else self._dropout(x)
        heads = zip(layers[self._num_layers :], self.target_shapes, strict=True)
        weights = [F.linear(x, *head).view(-1, *shape) for head, shape in heads]
        return [w.squeeze(0) for w in weights] if squeeze and len(x) == 1 else weights


class ChunkedHyperNetworkHandler(nn.Module):
    """A ``HyperNetwork`` that makes one chunk, from [task embedding, chunk embedding]."""

    requires_ext_input = False

    def __init__(
        self, target_shapes, num_tasks, chunk_dim=2586, layers=(50, 100), te_dim=8, activation_fn=None, use_bias=True,
        no_weights=False, ce_dim=None, dropout_rate=-1, noise_dim=-1,
    ):  # fmt: skip
        super().__init__()
        self.target_shapes, self.num_task_embs = target_shapes, num_tasks
        self.has_theta, self.has_task_embs = not no_weights, True
        self._hypernet = HyperNetwork(
            [[chunk_dim]], num_tasks, layers, False, te_dim, False, activation_fn, use_bias, no_weights, ce_dim,
            dropout_rate, noise_dim,
        )  # fmt: skip
        self.num_outputs = sum(math.prod(shape) for shape in target_shapes)
        self.chunk_embeddings = nn.Parameter(torch.randn(math.ceil(self.num_outputs / chunk_dim), ce_dim))
        self.theta_shapes = [list(self.chunk_embeddings.shape), *self._hypernet.theta_shapes]

    @property
    def theta(self):
        return [self.chunk_embeddings, *self._hypernet.theta]

    def get_task_embs(self):
        return self._hypernet.get_task_embs()

    def get_task_emb(self, task_id):
        return self._hypernet.get_task_emb(task_id)

    def forward(self, task_id=None, theta=None, dTheta=None, task_emb=None, ext_inputs=None, squeeze=True):
        theta = self.theta if theta is None else theta
        theta = theta if dTheta is None else [p + d for p, d in zip(theta, dTheta, strict=True)]
        chunks = self._hypernet.forward(task_id, theta[1:], None, task_emb, theta[0], False)[0]
        flat = chunks.reshape(-1)[: self.num_outputs].split([math.prod(shape) for shape in self.target_shapes])
        return [w.view(shape) for w, shape in zip(flat, self.target_shapes, strict=True)]


class MainNetwork(nn.Module):
    """A network of functions: a hidden layer of 5, and an output layer."""

    def __init__(self, n_in=4, n_out=6):
        super().__init__()
        self.param_shapes = [[5, n_in], [5], [n_out, 5], [n_out]]
        self._weights = nn.ParameterList(torch.randn(*shape) for shape in self.param_shapes)

    def forward(self, x, weights=None):
        w, b, w_out, b_out = self._weights if weights is None else weights
        return F.linear(F.linear(x, w, b).sigmoid(), w_out, b_out)
