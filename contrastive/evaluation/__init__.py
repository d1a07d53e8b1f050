"""What a trained model can do: embedding, classifiers, retrieval, comparison, and the report of a run."""

from contrastive.evaluation.cautions import reader_warnings
from contrastive.evaluation.classifier_file import load_classifier
from contrastive.evaluation.controls import ProbeOutcome, probe_with_controls
from contrastive.evaluation.embed import Embeddings, embed, embed_texts
from contrastive.evaluation.examples import Examples
from contrastive.evaluation.feature_store import StoredFeatures, stored_features
from contrastive.evaluation.fewshot import few_shot
from contrastive.evaluation.knn import knn_sweep
from contrastive.evaluation.labelled import has_captions, open_labelled
from contrastive.evaluation.pairs import evaluate_pairs
from contrastive.evaluation.predictions import Predictions, write_predictions
from contrastive.evaluation.probe import LinearProbe
from contrastive.evaluation.report import write_report
from contrastive.evaluation.stored import model_hash
from contrastive.evaluation.table import format_results_table
from contrastive.evaluation.tasks import SCALARS, Evaluation, evaluate_labelled
from contrastive.evaluation.template_spread import label_order_difference, template_spread
from contrastive.evaluation.templates import read_templates
from contrastive.evaluation.zeroshot import ZeroShotClassifier

__all__ = [
    "Embeddings",
    "SCALARS",
    "Evaluation",
    "Examples",
    "LinearProbe",
    "Predictions",
    "ProbeOutcome",
    "StoredFeatures",
    "ZeroShotClassifier",
    "embed",
    "embed_texts",
    "evaluate_labelled",
    "evaluate_pairs",
    "few_shot",
    "format_results_table",
    "has_captions",
    "knn_sweep",
    "label_order_difference",
    "load_classifier",
    "model_hash",
    "open_labelled",
    "probe_with_controls",
    "read_templates",
    "reader_warnings",
    "stored_features",
    "template_spread",
    "write_predictions",
    "write_report",
]
