"""The program that is submitted with the artifact."""
