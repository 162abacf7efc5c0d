"""What the report of a question answering model has of its own: what is compared, and how its pages say it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipelines.core.task import Comparison, StageResult
from pipelines.report.pages import TEACHER
from pipelines.tasks.base import LEARNED_FROM, check_predictions, examples_section, mean, worse_examples
from pipelines.tasks.question_answering.scores import answers_of, best_spans, normalized, score_answers
from pipelines.tasks.texts import TextPresentation, token_limit

QUESTION, CONTEXT = "Who wrote Emma?", "Emma was written by Jane Austen in 1815."


def compare_answers(stages: list[StageResult], rows: Any, unanswerable: bool, shipped: str) -> Comparison:
    """What a report says of models that answer the questions in `rows`; the unit of the bootstrap is the question."""
    contexts, questions, references = (list(rows[name]) for name in ("context", "question", "answers"))
    best = [replace(stage, predictions=best_spans(stage.predictions, len(questions), unanswerable)) for stage in stages]
    check_predictions(best, (len(questions), 3), "questions; score, start and end")
    answers = {stage.name: answers_of(stage.predictions, contexts) for stage in best}
    scores = {name: score_answers(found, references) for name, found in answers.items()}
    plain = {name: [normalized(one) for one in found] for name, found in answers.items()}
    compared = {
        name: {
            "metrics": {"f1": float(partly.mean()), "exact_match": float(exact.mean())},
            "agreement": float(np.mean([a == b for a, b in zip(plain[name], plain[TEACHER], strict=True)])),
        }
        for name, (exact, partly) in scores.items()
    }
    lost = scores[TEACHER][1] - scores[shipped][1]
    columns = {"reference": [one[0] if one else "" for one in references]}
    columns |= {"teacher": answers[TEACHER], "shipped": answers[shipped]}
    listed = {name: np.array(texts) for name, texts in columns.items()}
    report = {
        "test_examples": len(questions),
        "test_unanswerable": sum(not one for one in references),
        "worse_examples": worse_examples(lost, questions, **listed) | {"better_total": int((lost < 0).sum())},
    }
    samples = {name: (partly,) for name, (_, partly) in scores.items()}
    return Comparison(compared, report, samples, mean)


class AnswerPresentation(TextPresentation):
    """What a report says of a model that answers questions with parts of texts."""

    unit = "questions"
    latency_of = "one window"
    shown: Mapping[str, str] = {"exact_match": "exact match"}
    hub_metrics: Mapping[str, str] = {"f1": "f1", "exact_match": "exact_match"}
    limitations: Sequence[str] = (
        "An answer is always a part of the text, copied as it stands. What the text implies but does not say is no answer.",
        "Where its training data had no question without an answer, the model always gives one, however unlikely. Its score is not "
        "calibrated, and compression changes it.",
        LEARNED_FROM,
    )
    javascript = ("answer", f"{json.dumps(QUESTION)}, {json.dumps(CONTEXT)}")

    def kind(self, report: dict[str, Any]) -> str:
        some = ", or that the text has none" if report["test_unanswerable"] else ""
        return f"the part of a text that answers a question{some}"

    def how_scored(self, report: dict[str, Any]) -> str:
        return (
            "*f1*: the mean over the questions of the F1 of an answer's words, by the rules of SQuAD (without case, punctuation and articles; "
            "the best of several references). *exact match*: the share of answers with the very words. *retained*: F1 divided by the "
            "teacher's. *agreement*: the share of questions that are answered with the teacher's words."
        )

    def what_was_lost(self, report: dict[str, Any], shipped: dict[str, Any], listed: int) -> str:
        worse, name = report["worse_examples"], shipped["name"]
        section = examples_section(
            f"Test questions whose answer from {name} has a lower F1 than the teacher's: {worse['total']:,} of {report['test_examples']:,}. "
            f"The other way round: {worse['better_total']:,}.",
            "that lost most",
            worse["examples"][:listed],
            ["example", "question", "reference", "teacher's answer", f"{name}'s answer"],
            lambda one: [str(one["index"]), one["text"], *(one[key] for key in ("reference", "teacher", "shipped"))],
            text_columns=5,
        )
        return "\n\n".join(section)

    def in_shell(self, report: dict[str, Any]) -> str:
        return f'--pair "{QUESTION}" "{CONTEXT}"'

    def in_python(self, report: dict[str, Any], model: str) -> str:
        return f"""
            from transformers import AutoModelForQuestionAnswering, AutoTokenizer
            tokenizer, model = (kind.from_pretrained({json.dumps(model)}) for kind in (AutoTokenizer, AutoModelForQuestionAnswering))
            inputs = tokenizer({json.dumps(QUESTION)}, {json.dumps(CONTEXT)}, return_tensors="pt")
            found = model(**inputs)
            print(tokenizer.decode(inputs["input_ids"][0, found.start_logits.argmax() : found.end_logits.argmax() + 1]))
        """

    def in_onnx_runtime(self, report: dict[str, Any], directory: str) -> str:
        return f"""
            import onnxruntime
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained({json.dumps(directory)})
            texts = {json.dumps(QUESTION)}, {json.dumps(CONTEXT)}
            inputs = tokenizer(*texts, truncation="only_second", max_length={token_limit(report)}, return_tensors="np")
            session = onnxruntime.InferenceSession({json.dumps(directory + "/model.onnx")})
            start, end = session.run(["start_logits", "end_logits"], {{node.name: inputs[node.name] for node in session.get_inputs()}})
            print(tokenizer.decode(inputs["input_ids"][0, start.argmax() : end.argmax() + 1]))
        """
