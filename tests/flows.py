"""Problems of which any outputs are differentiated, with a random gradient flowing into each."""

from dataclasses import dataclass

import torch
from cases import Case, Problem

import pymeta

OUTPUTS = ("loss", "task_losses", "predictions", "adapted", "step_losses")


@dataclass(frozen=True)
class Flows:
    """What of a call is differentiated, and what it has of its own."""

    outputs: tuple[str, ...]  # of OUTPUTS
    start: bool = False
    rates: bool = False
    step_weights: bool = False
    targets: bool = False  # query targets are given
    of_parameters: bool = False  # alone: gradients by nothing else are wanted


class OperatorProblem(Problem):
    """A problem whose results are gradients of a random sum of its outputs."""

    def __init__(self, case: Case, flows: Flows) -> None:
        super().__init__(case)
        self.flows = flows
        tasks, names = case.tasks, dict(self.net.named_parameters())
        self.start = {n: p.detach() + 0.1 * torch.randn(tasks, *p.shape) for n, p in names.items()}
        self.rates = 0.2 * torch.rand(tasks)
        self.step_weights = torch.rand(max(case.steps, 1))
        self.flow_losses = torch.randn(tasks)
        self.flow_steps = torch.randn(len(self.step_weights), tasks)
        self.flow_predictions = torch.randn(tasks, case.query, case.out)
        self.flow_adapted = {n: torch.randn_like(v) for n, v in self.start.items()}

    @property
    def judges(self) -> bool:
        return self.flows.targets

    def results(self, module: pymeta.MAML, tasks: list[int] | None = None) -> dict:
        case, flows, dtype = self.case, self.flows, next(module.model.parameters()).dtype
        tasks = list(range(case.tasks)) if tasks is None else tasks
        support, query = self.support.of(tasks).to(dtype), self.query.of(tasks).to(dtype)
        leaves = {"xs": support.x, "xq": query.x} if case.input_gradients else {}
        numbers = case.loss != "cross_entropy"  # distributions have no gradient in the core
        if numbers:
            leaves["ys"] = support.y
        if support.anchors is not None:
            leaves["anchor"] = support.anchors
        for name, side in (("support", support), ("query", query)):
            given = {f"{name}_weights": side.weights, f"{name}_offset": side.offset}
            leaves |= {n: v for n, v in given.items() if v is not None}
        if numbers and flows.targets:
            leaves["yq"] = query.y
        if flows.of_parameters:
            leaves = {}
        for value in leaves.values():
            value.requires_grad_()
        arguments, options = self.arguments(support, query)
        if not flows.targets:
            arguments[3] = options["query_weights"] = None
            leaves.pop("query_weights", None)
        parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if flows.start:
            start = {n: v[tasks].to(dtype).requires_grad_() for n, v in self.start.items()}
            options["start"] = start
            parameters = {**{n: p for n, p in parameters.items() if n == "lr"}, **start}
        if flows.rates:
            leaves["rates"] = options["lr"] = self.rates[tasks].to(dtype).requires_grad_()
        adapt_options = {k: v for k, v in options.items() if not k.startswith("query")}
        if flows.step_weights:
            options["step_weights"] = self.step_weights[: case.steps].to(dtype)
        out = module(*arguments, **options)
        total, found = torch.zeros((), dtype=dtype), {}
        found["predictions"] = [p[:n] for p, n in zip(out.predictions, query.sizes, strict=True)]
        if "loss" in flows.outputs:
            total = total + out.loss
        if "task_losses" in flows.outputs:
            total = total + (out.task_losses * self.flow_losses[tasks].to(dtype)).sum()
        if "step_losses" in flows.outputs:
            flow = self.flow_steps[: case.steps, tasks].to(dtype)
            total = total + (out.step_losses * flow).sum()
        if "predictions" in flows.outputs:
            for p, t in zip(found["predictions"], tasks, strict=True):
                total = total + (p * self.flow_predictions[t, : len(p)].to(dtype)).sum()
        if "adapted" in flows.outputs:
            adapted = module.adapt(*arguments[:2], **adapt_options, create_graph=True)
            found["adapted"] = adapted
            for n, v in adapted.items():
                flow = self.flow_adapted[n.removeprefix("model.")][tasks].to(dtype)
                total = total + (v * flow).sum()
        if flows.targets:
            found |= {"loss": out.loss, "task_losses": out.task_losses}
        if flows.step_weights:
            found["step_losses"] = out.step_losses
        if not total.requires_grad:
            return found
        inputs = {**parameters, **leaves}
        grads = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
        by_name = {
            n: torch.zeros_like(v) if g is None else g
            for (n, v), g in zip(inputs.items(), grads, strict=True)
        }
        lr = by_name.pop("lr", None)
        rest = {n: by_name.pop(n) for n in list(leaves)}
        return {**found, "gradients": by_name, "lr": lr, **rest}
