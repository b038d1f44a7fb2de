"""Temporary."""


def direct_rectangles(x_TNM, weight_T, y_SM, width, rectangles, grad_h_TNH, grad_basis_SK, value):
    for t0, t1, n0, n1, c0, c1 in rectangles:
        x = x_TNM[t0:t1, n0:n1].flatten(0, 1)
        y = y_SM[c0:c1]
        d = x @ y.T
        wd = weight_T[t0:t1].repeat_interleave(n1 - n0)[:, None] * d
        value += (wd * d).double().sum()
        grad_h_TNH[t0:t1, n0:n1] += (2 * wd @ y[:, :width]).view(t1 - t0, n1 - n0, width)
        ha = x[:, width:].clone()
        ha[:, :width] += x[:, :width]
        grad_basis_SK[c0:c1] += 2 * wd.T @ ha
