"""What is asked about images: for descriptions in detail, and of the model that captions images."""

# One of these is drawn for each sample of the kind `detail`, all with the same probability.
DETAIL_QUESTIONS = (
    "Describe this image thoroughly.",
    "What do you see here? Leave nothing out.",
    "Give a full account of this image.",
    "Tell me everything that this image shows.",
    "Walk me through this image in detail.",
    "Please describe the scene as exactly as you can.",
    "Can you describe what is in this image, and where it is?",
    "Write a careful description of this image.",
    "I can't see the image. Describe it to me in detail.",
    "What does this image show? Be thorough.",
    "Explain in detail what can be seen here.",
    "Put this image into words, with all its details.",
    "Describe the things in this image and how they stand to each other.",
    "Please give me a long and precise description of this image.",
)

CAPTION_SYSTEM = (
    "You look at images and say what they show, in plain sentences. You write down only what can "
    "be seen."
)
CAPTION_QUESTION = (
    "Write five sentences about this image, one on each line. Each must be understood without the "
    "others and say what is most important: who or what is there, how many, what they do, what "
    "they look like, where they are. Write the sentences alone, without numbers in front."
)
