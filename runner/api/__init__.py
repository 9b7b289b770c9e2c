"""The engine for people who keep their own loop, in the words that users of Accelerate know."""
