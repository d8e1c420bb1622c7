"""Instruction data: near-duplicates, lint, released files, instruction sets and plots."""
