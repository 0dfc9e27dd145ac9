"""What MM-Interleaved is asked in fine-tuning, and in the bench's tasks with its protocol.

Template "document" writes turns one after another as they are, so blanks between them are part of
the texts: an answer begins with one.
"""

VQA = (
    "Based on the image, please answer the question. <image>{question} Please provide an accurate "
    "answer within one word. The answer is:"
)
UNANSWERABLE = (
    "Based on the image, please answer the question. <image>{question} When the provided "
    "information is insufficient, respond with 'Unanswerable'. Please provide an accurate answer "
    "within one word. The answer is:"
)
CAPTION = "<image>a photo of"
PARAGRAPH = "<image>Please describe the image in detail. The image depicts"
DIALOG = "<image> caption: {caption}."
ROUND = " question: {question}? answer:"
BOX = (
    "<image>Provide the bounding box coordinate of the region this sentence describes. {text} <box>"
)
# Of these, the paper has no wording.
REGION_CAPTION = "<image>Describe the <ref>region</ref><box>{box}</box> in a phrase."
REGION_QUESTION = "<image>About the <ref>region</ref><box>{box}</box>: {question}"
GROUNDED = "<image>Describe the image, with the regions of what you name."
SEGMENTATION = "<image>{caption}."
