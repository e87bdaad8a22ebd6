"""Figures of one or two quantities along each branch of a study."""

from __future__ import annotations

from thalweg.analysis.figures.along_steps import figure_of_branches
from thalweg.analysis.figures.drawing import BAND, LOG_BAND
from thalweg.analysis.quantities import PARTS, quantities
from thalweg.registry import figures

figures.add_named(
    figure_of_branches(
        "training-loss",
        "Training loss of the branches",
        "Full training loss before the branch point and along the branches, which share checkpoint "
        "and mini-batches; early training is left out (the CSV file has it). " + LOG_BAND,
        "loss",
        late=True,
    )
)

figures.add_named(
    figure_of_branches(
        "test-accuracy",
        "Test accuracy of the branches",
        "Accuracy on held-out samples; early training is left out (the CSV file has it). " + BAND,
        "test_accuracy",
        late=True,
    )
)

figures.add_named(
    figure_of_branches(
        "alignment-of-branches",
        "Alignment of the full gradient, branch by branch",
        "chi_k of the gradient of the full training loss along each branch. Running mean over "
        f"{quantities['alignment_gradient'].window:.0%} of a run. " + BAND,
        "alignment_gradient",
        share_y=True,
    )
)

figures.add_named(
    figure_of_branches(
        "sharpness",
        "Sharpness against the edge of stability",
        "Learning rate times sharpness along each branch; line: 2, beyond which plain gradient "
        "descent is unstable. " + BAND,
        "lr_sharpness",
    )
)

# The sharpness itself: where learning rates change, its product with them hides it.
figures.add_named(
    figure_of_branches(
        "sharpness-of-branches",
        "Sharpness of the branches",
        "Largest eigenvalue of the Hessian of the full training loss along each branch. "
        + LOG_BAND,
        "sharpness",
        linear=True,
    )
)

_MOST_OVER = 2.5

# Adam's first steps, before its second moments have grown, are far above the threshold.
figures.add_named(
    figure_of_branches(
        "stability",
        "Sharpness over the optimizer's own stability threshold",
        "Sharpness (preconditioned, where the optimizer has a preconditioner) over the threshold "
        "of full-batch training with this optimizer; line: 1, the edge of stability. What is above "
        f"{_MOST_OVER} is cut off. " + BAND,
        "stability_ratio",
        highest=_MOST_OVER,
    )
)

figures.add_named(
    figure_of_branches(
        "effective-learning-rates",
        "Effective learning rates of the proposed update",
        "-<Q delta, Q g> / norm(Q g)^2 of the proposed update delta for the dominant and the bulk "
        f"projector Q, as ratio of sums over {quantities['effective_lr_bulk'].window:.0%} of a "
        "run; grey: the learning rate set. " + BAND,
        *(f"effective_lr_{part}" for part in PARTS),
        beside="learning_rate",
        share_y=True,
        height=3.4,
    )
)

figures.add_named(
    figure_of_branches(
        "distance",
        "Distance from the branch point",
        "Length of the parameters' way from the branch point, as the crow flies, split on the "
        "dominant subspace there. The two parts have different scales. " + BAND,
        *(f"displacement_{part}" for part in PARTS),
        height=3.4,
    )
)

figures.add_named(
    figure_of_branches(
        "overlap",
        "Overlap of the dominant subspace with that at the branch point",
        "Mean squared cosine, trace(P P')/k, of the dominant subspace with that at the branch "
        "point. " + BAND,
        "overlap_branch_point",
        share_y=True,
    )
)

figures.add_named(
    figure_of_branches(
        "noise",
        "Fraction of the gradient noise in the dominant subspace",
        "Part of the variance of the mini-batch gradient that lies in the dominant subspace, along "
        "each branch. " + BAND,
        "noise_share_dominant",
        share_y=True,
    )
)
