"""Comparing decoding methods: what they gain in quality, and what that costs.

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
    What the decoding reward model, which the methods aim at, gives a whole response.
gold
    What a second reward gives it, which no method sees: a model, a function, the demo's grammar.
"""
