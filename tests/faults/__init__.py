"""Trainings whose processes are killed."""
