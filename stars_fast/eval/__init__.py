"""Comparing decoding methods in quality and cost.

Terms
-----
spec
    A method with its parameters and the language model that it runs on, under a label.
reference
    The spec that all others are compared to: ``vanilla`` on the base model.
run
    All prompts of one spec with one seed, as one batch; under an attack, all attacked prompts.
attack
    A text put behind each prompt, as a part of it or as the opening of the response.
reward
    The decoding reward model's score of a whole response; the methods aim at it.
gold
    A second score, which no method sees: from a model, a function, or the demo's grammar.
"""
