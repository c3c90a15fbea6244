"""Rewards for the YAMLs of the tests."""


def odd_letters():
    """A reward that a model of random tokens can earn: the share of letters with odd numbers."""

    def reward(prompt, answer, row):
        assert row["reference"].startswith("A ")
        numbers = [ord(letter) for letter in answer]
        return sum(number % 2 for number in numbers) / max(len(numbers), 1)

    return reward
