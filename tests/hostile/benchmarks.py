"""Official files of every benchmark, as small as they can be, to be damaged by rule."""

import csv
import io
import json
import pathlib
import pickle
from collections.abc import Iterator

from tests.eval.toy import png

_LONG = "0" * 11
_WORDS = {"question_type": "what", "answer_type": "other", "multiple_choice_answer": "a"}
_SOFT = [{"answer": "a", "answer_id": k} for k in range(10)]
_VQA = [{"question_id": k, "image_id": k, "question": "What?"} for k in (1, 2)]
_NOTES = [{"question_id": k, "image_id": k, "answers": _SOFT, **_WORDS} for k in (1, 2)]
_CHOICES = {f"choice_{c}": c for c in "abcd"}


def _seen(key: str) -> dict:
    sentences = [{"raw": "A dog runs.", "tokens": ["a"]}, {"raw": "A dog."}]
    rows = [{"filename": f"{k}.png", "split": "test", "sentences": sentences, key: k,
             "filepath": "val2014"} for k in (1, 2)]  # fmt: skip
    return {"images": rows, "dataset": "x"}


def _csv(*rows) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


_REFS = [{"split": "val", "ann_id": k, "image_id": k, "ref_id": k,
          "sentences": [{"sent_id": k, "sent": "it"}]} for k in (1, 2)]  # fmt: skip
_BASE64 = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"  # noqa: E501
)

# Task as it is asked for -> path -> JSON value, list of lines (.jsonl, and POPE's .json), or text.
# Images are made where a path ends with .png or .jpg.
BENCHMARKS: dict[str, dict] = {
    "easy_vqa": {
        "questions_test.jsonl": [
            {"id": str(k), "image": f"{k}.png", "question": "what color?", "answer": "red"}
            for k in (1, 2)
        ],
        "images/1.png": 0,
        "images/2.png": 0,
    },
    "chartqa": {
        f"test/test_{part}.json": [{"imgname": "1.png", "query": "How?", "label": "3"}]
        for part in ("human", "augmented")
    }
    | {"test/png/1.png": 0},
    "gqa": {
        "testdev_balanced_questions.json": {
            str(k): {
                "question": "Is it?",
                "imageId": "1",
                "answer": "yes",
                "groups": {"global": None},
                "types": {"structural": "verify", "semantic": "attr"},
            }
            for k in (1, 2)
        },
        "images/1.jpg": 0,
    },
    "pope:setting=random": {
        "coco_pope_random.jsonl": [
            {"question_id": k, "image": f"{k}.png", "text": "Is it?", "label": "yes"}
            for k in (1, 2)
        ],
        "val2014/1.png": 0,
        "val2014/2.png": 0,
    },
    "mme": {"existence/1.txt": "Is it?\tYes\nIs it not?\tNo\n", "existence/1.png": 0},
    "mmbench": {
        "MMBench_DEV_EN.tsv": "index\tquestion\tA\tB\tanswer\timage\thint\tcategory\n"
        f"1\tWhat?\tx\ty\tA\t{_BASE64}\t\tc\n2\tWhat?\tx\ty\tB\t1\tso\tc\n"
    },
    "mmvp": {
        "Questions.csv": _csv(
            ["Index", "Question", "Options", "Correct Answer"],
            [1, "Up?", "(a) Up (b) Down", "(a)"],
            [2, "Up?", "(a) Up (b) Down", "(b)"],
        ),
        "MMVP Images/1.jpg": 0,
        "MMVP Images/2.jpg": 0,
    },
    "seed:kind=all": {
        "SEED-Bench.json": {
            "question_type": {"Scene": 1},
            "questions": [
                {
                    "question_id": 1,
                    "question_type_id": 1,
                    "data_type": "image",
                    "question": "What?",
                    "data_id": "1.png",
                    "answer": "A",
                    **_CHOICES,
                },
                {
                    "question_id": 2,
                    "question_type_id": 1,
                    "data_type": "video",
                    "question": "What?",
                    "data_id": "v",
                    "answer": "A",
                    "segment": [0, 1],
                    **_CHOICES,
                },
            ],
        },
        "SEED-Bench-image/1.png": 0,
        "SEED-Bench-video/v/1.png": 0,
    },
    "seed:form=choose": {
        "SEED-Bench.json": {
            "question_type": {"Scene": 1},
            "questions": [
                {
                    "question_id": 1,
                    "question_type_id": 1,
                    "data_type": "image",
                    "question": "What?",
                    "data_id": "1.png",
                    "answer": "A",
                    **_CHOICES,
                }
            ],
        },
        "SEED-Bench-image/1.png": 0,
    },
    "realworldqa": {
        "annotations.json": [{"image": "1.png", "question": "Which?\nA. x\nB. y", "answer": "A"}],
        "1.png": 0,
    },
    "vstar": {
        "direct_attributes/1.json": {"question": "What?", "options": ["x", "y"]},
        "direct_attributes/1.png": 0,
    },
    "vstar:parser=first": {
        "test_questions.jsonl": [
            {
                "image": "direct_attributes/1.png",
                "text": "What?\n(A) x\n(B) y",
                "category": "c",
                "label": "A",
            }
        ],
        "direct_attributes/1.png": 0,
    },
    "scienceqa:file=own.json": {
        "problems.json": {
            str(k): {
                "question": "What?",
                "choices": ["x", "y"],
                "answer": 1,
                "hint": "so",
                "image": "image.png",
                "split": "test",
                "grade": "grade2",
                "subject": "natural science",
            }
            for k in (1, 2)
        },
        "own.json": [{"id": "1", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}],
        "pid_splits.json": {"test": ["1", "2"]},
        "images/test/1/image.png": 0,
        "images/test/2/image.png": 0,
    },
    "scienceqa:gpt4=other.json,style=reasoning": {
        "problems.json": {"1": {"question": "What?", "choices": ["x", "y"], "answer": 1}},
        "pid_splits.json": {"test": ["1"]},
        "other.json": {"outputs": {"1": "The answer is B."}},
    },
    "vqav2": {
        "v2_OpenEnded_mscoco_val2014_questions.json": {"questions": _VQA},
        "v2_mscoco_val2014_annotations.json": {"annotations": _NOTES},
        f"val2014/COCO_val2014_{_LONG}1.jpg": 0,
        f"val2014/COCO_val2014_{_LONG}2.jpg": 0,
    },
    "vizwiz": {
        "val.json": [
            {"image": f"{k}.jpg", "question": "What?", "answers": _SOFT, "answer_type": "other"}
            for k in (1, 2)
        ],
        "val/1.jpg": 0,
        "val/2.jpg": 0,
    },
    "textvqa:ocr=tokens": {
        "TextVQA_0.5.1_val.json": {
            "data": [
                {"question_id": 1, "image_id": "1", "question": "what?", "answers": ["a"] * 10}
            ]
        },
        "TextVQA_Rosetta_OCR_v0.2_val.json": {"data": [{"image_id": "1", "ocr_tokens": ["x"]}]},
        "train_images/1.jpg": 0,
    },
    "textvqa:ocr=token": {
        "TextVQA_0.5.1_val.json": {
            "data": [
                {"question_id": 1, "image_id": "1", "question": "what?", "answers": ["a"] * 10}
            ]
        },
        "llava_textvqa_val_v051_ocr.jsonl": [
            {
                "question_id": "1",
                "text": "what?\nReference OCR token: x\nAnswer the question using "
                "a single word or phrase.",
            }
        ],
        "train_images/1.jpg": 0,
    },
    "coco_caption:tokenizer=python": {
        "dataset_coco.json": _seen("cocoid"),
        "val2014/1.png": 0,
        "val2014/2.png": 0,
    },
    "nocaps:tokenizer=python": {
        "nocaps_val_4500_captions.json": {
            "images": [{"id": k, "file_name": f"{k}.png", "domain": "in-domain"} for k in (1, 2)],
            "annotations": [{"image_id": k, "caption": "A dog."} for k in (1, 2)],
        },
        "val/1.png": 0,
        "val/2.png": 0,
    },
    "image2paragraph:tokenizer=python": {
        "paragraphs_v1.json": [
            {"image_id": k, "url": f"https://x/VG_100K/{k}.jpg", "paragraph": "A dog. It runs."}
            for k in (1, 2)
        ],
        "test_split.json": [1, 2],
        "VG_100K/1.jpg": 0,
        "VG_100K/2.jpg": 0,
    },
    "refcoco": {
        "refs(unc).p": _REFS,
        "instances.json": {
            "images": [{"id": k, "width": 8, "height": 6} for k in (1, 2)],
            "annotations": [{"id": k, "bbox": [0, 0, 4, 3]} for k in (1, 2)],
        },
        f"train2014/COCO_train2014_{_LONG}1.jpg": 0,
        f"train2014/COCO_train2014_{_LONG}2.jpg": 0,
    },
    "visdial": {
        "visdial_1.0_val.json": {
            "data": {
                "questions": ["is it", "what"],
                "answers": ["yes", "no", "a"],
                "dialogs": [
                    {
                        "image_id": 1,
                        "caption": "a dog",
                        "dialog": [
                            {"question": 0, "answer": 1, "answer_options": [0, 1], "gt_index": 1},
                            {"question": 1, "answer": 2, "answer_options": [2, 1], "gt_index": 0},
                        ],
                    }
                ],
            }
        },
        "visdial_1.0_val_dense_annotations.json": [
            {"image_id": 1, "round_id": 2, "gt_relevance": [1.0, 0.2]}
        ],
        f"VisualDialog_val2018/VisualDialog_val2018_{_LONG}1.jpg": 0,
    },
    "mvbench:only=action_count,frames=2": {
        "json/action_count.json": [
            {
                "video": "v",
                "question": "What?",
                "candidates": ["x", "y"],
                "answer": "x",
                "start": 0.0,
                "end": 1.0,
            }
        ],
        "video/perception/videos/v/1.jpg": 0,
    },
    "mmvet": {
        "mm-vet.json": {
            f"v1_{k}": {
                "imagename": "1.png",
                "question": "What?",
                "answer": "a <AND> b",
                "capability": ["ocr"],
            }
            for k in (1, 2)
        },
        "images/1.png": 0,
    },
    "llava_bench_wild": {
        "questions.jsonl": [
            {"question_id": 1, "image": "1.png", "text": "What?", "category": "conv"}
        ],
        "answers_gpt4.jsonl": [{"question_id": 1, "text": "A dog.", "answer_id": "x"}],
        "context.jsonl": [{"image": "1.png", "caption": ["a dog"]}],
        "rule.json": {"llava_bench_conv": {"role": "Assistant", "prompt": "Grade."}},
        "images/1.png": 0,
    },
    "llava_bench_coco": {
        "qa90_questions.jsonl": [
            {"question_id": 1, "image": f"{_LONG}1.jpg", "text": "What?", "category": "conv"}
        ],
        "qa90_gpt4_answer.jsonl": [{"question_id": 1, "text": "A dog."}],
        "caps_boxes_coco2014_val_80.jsonl": [
            {
                "image": f"{_LONG}1.jpg",
                "captions": ["a dog"],
                "instances": [{"category": "dog", "bbox": [0]}],
            }
        ],
        "rule.json": {"conv": {"role": "Assistant", "prompt": "Grade."}},
        f"val2014/COCO_val2014_{_LONG}1.jpg": 0,
    },
    "geneval:samples=1": {
        "evaluation_metadata.jsonl": [
            {
                "tag": "two",
                "prompt": "a dog and a cat",
                "exclude": [{"class": "dog", "count": 3}],
                "include": [
                    {"class": "dog", "count": 2, "color": "red"},
                    {"class": "cat", "position": ["left of", 0]},
                ],
            }
        ]
    },
    "dpg:samples=1": {
        "dpg_bench.csv": _csv(
            ["item_id", "proposition_id", "dependency", "tuple", "question_natural_language"],
            ["1", 1, 0, "entity - whole (dog)", "Is there a dog?"],
        ),
        "prompts/1.txt": "a dog",
    },
    "coco30k:fid_size=None": {
        "annotations/captions_val2014.json": {
            "images": [{"id": 1, "file_name": f"COCO_val2014_{_LONG}1.jpg"}],
            "annotations": [{"id": 5, "image_id": 1, "caption": "a dog"}],
        },
        f"val2014/COCO_val2014_{_LONG}1.jpg": 0,
    },
    "lncoco:fid_size=None,count=3": {
        "coco_val_captions.jsonl": [{"image_id": "1", "caption": "a dog"}],
        f"val2017/{_LONG}1.jpg": 0,
    },
    "vist:fid_size=None": {
        "test.story-in-sequence.json": {
            "annotations": [
                [
                    {
                        "story_id": "1",
                        "photo_flickr_id": "7",
                        "worker_arranged_photo_order": k,
                        "text": "a dog",
                    }
                ]
                for k in range(5)
            ]
        },
        "test/7.jpg": 0,
    },
    "vist:fid_size=None,frames=2": {
        "annotations/test_formatted_filtered.json": {
            "annotations": {
                "1": [{"image_id": "7", "caption": "a dog", "sequence_index": k} for k in range(5)]
            }
        },
        "images/test_images/7.png": 0,
    },
    "interleaved": {
        "prompts.jsonl": [
            {"id": "1", "prompt": "a dog", "images": ["1.png"]},
            {"id": "2", "prompt": "a cat"},
        ],
        "1.png": 0,
    },
}


def folder_of(spec: str) -> str:
    return spec.partition(":")[0]


def put(root: pathlib.Path, name: str, value) -> None:
    """Writes one file of a benchmark."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".png", ".jpg"):
        path.write_bytes(png("red"))
    elif path.suffix == ".p":
        path.write_bytes(pickle.dumps(value))
    elif isinstance(value, str):
        path.write_bytes(value.encode(errors="surrogatepass"))
    elif path.suffix == ".jsonl" and isinstance(value, list):
        text = "".join(json.dumps(row) + "\n" for row in value)
        (path.with_suffix(".json") if "pope" in name else path).write_text(text)
    else:
        path.write_text(json.dumps(value))


def places(value, here=()) -> Iterator[tuple]:
    """The way to every value inside of one, itself first."""
    yield here
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(child, (*here, key))


def changed(value, way: tuple, new):
    """A copy with another value at this place; `...`: without it."""
    if not way:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if way[1:] or new is not ...:
        copy[way[0]] = changed(value[way[0]], way[1:], new)
    else:
        del copy[way[0]]
    return copy
