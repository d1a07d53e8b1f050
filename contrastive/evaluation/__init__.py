"""What a trained model can do: embedding, zero-shot, linear probe, retrieval, and the report of a run."""

from contrastive.evaluation.classifier_file import load_classifier
from contrastive.evaluation.controls import ProbeOutcome, probe_with_controls
from contrastive.evaluation.embed import Embeddings, embed, embed_texts
from contrastive.evaluation.labelled import open_labelled
from contrastive.evaluation.probe import LinearProbe
from contrastive.evaluation.report import write_report
from contrastive.evaluation.table import format_results_table
from contrastive.evaluation.tasks import Evaluation, Examples, evaluate_labelled, evaluate_pairs
from contrastive.evaluation.template_spread import label_order_difference, template_spread
from contrastive.evaluation.templates import read_templates
from contrastive.evaluation.zeroshot import ZeroShotClassifier

__all__ = [
    "Embeddings",
    "Evaluation",
    "Examples",
    "LinearProbe",
    "ProbeOutcome",
    "ZeroShotClassifier",
    "embed",
    "embed_texts",
    "evaluate_labelled",
    "evaluate_pairs",
    "format_results_table",
    "label_order_difference",
    "load_classifier",
    "open_labelled",
    "probe_with_controls",
    "read_templates",
    "template_spread",
    "write_report",
]
