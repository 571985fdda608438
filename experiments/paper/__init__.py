"""The paper's question, memory at equal accuracy: its study, answers, figures and tables."""
