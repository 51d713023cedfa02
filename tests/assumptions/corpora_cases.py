"""Rows of the public sets under their published columns, written for the tests, and how each can be spoilt."""

HUMAN = {"type": "human", "content": "Is the moon far? Please answer."}
# (set, part): file name, rows under the published columns, a change that breaks row 2, what the error must say
ROWS = {
    ("elephant_oeq", ""): (
        "OEQ.csv",
        [
            {"": i, "prompt": f"p{i}", "human": "h", "source": "columnist", "validation_human": v}
            | {"indirectness_human": "ERROR", "framing_human": ""}
            for i, v in enumerate(["1.0", "0"])
        ],
        {"validation_human": "yes"},
        "a label is a number, got 'yes'",
    ),
    ("elephant_aita_yta", ""): (
        "AITA-YTA.csv",
        [
            {"": 0, "prompt": f"AITA {i}", "top_comment": "YTA", "is_asshole": "1", "ytanta": "YTA"}
            | {f"{o}_human": "" for o in ("validation", "indirectness", "framing")}
            for i in range(2)
        ],
        {"prompt": " "},
        "'prompt' is empty",
    ),
    ("elephant_aita_nta", ""): (
        "AITA-NTA-OG.csv",
        [{"": 0, "id": f"x{i}", "original_post": f"AITA {i}"} for i in range(2)],
        {"id": ""},
        "'id' is empty",
    ),
    ("elephant_moral_pairs", ""): (
        "AITA-NTA-FLIP.csv",
        [{"": 0, "id": f"x{i}", "original_post": f"o{i}", "flipped_story": f"f{i}"} for i in range(2)],
        {"original_post": ""},
        "'original_post' is empty",
    ),
    ("elephant_ss", ""): (
        "SS.csv",
        [
            {"": i, "sentence": f"I am {i}.", "self_attitude": "negative", "other_attitude": ""}
            for i in (2, 7)
        ],
        {"sentence": ""},
        "'sentence' is empty",
    ),
    **{
        ("sycophancy_eval", part): (
            f"{part}.jsonl",
            [
                {"prompt": [HUMAN], "base": {"question": "q", "correct_answer": str(i)}, "metadata": {}}
                for i in (1, 2)
            ],
            {"prompt": [{"type": "robot", "content": "x"}]},
            "a turn has type",
        )
        for part in ("answer", "are_you_sure", "feedback", "mimicry")
    },
    ("cancer_myth", ""): (
        "all_data.json",
        [
            {"question": f"q{i}", "presupposition_correction": "c", "category": "k", "QID": i}
            for i in range(2)
        ],
        {"question": ""},
        "'question' is empty",
    ),
    ("cancer_myth_nfp", ""): (
        "nfp.json",
        [
            {"example_question": f"q{i}", "example_assumption": "a", "source_cancer": "c", "QID": 1000 + i}
            for i in range(2)
        ],
        {"example_question": ""},
        "'example_question' is empty",
    ),
    ("cancer_myth_tpq", ""): (
        "test.jsonl",
        [{"question": f"q{i}", "cancer": "c", "id": i, "passages": []} for i in range(2)],
        {"question": 3},
        "'question' must be str",
    ),
    **{
        ("qa2", part): (
            f"QAQA_{part}_set_Dec2022.csv",
            [
                {"question": f"q{i}", "all_assumptions_valid": v, "abstractive_answer": "a"}
                | {"questionable_assumption": "", "url_extractive_evidence_or_answer": "u"}
                for i, v in enumerate(["has_invalid", "all_valid"])
            ],
            {"all_assumptions_valid": "perhaps"},
            "has_invalid or all_valid",
        )
        for part in ("adaptation", "evaluation")
    },
    ("syn_qa2", ""): (
        "syn_qa2_singlehop.csv",
        [
            {"x": "a", "y": "b", "perturbed_x": "c", "wikidata_property": "P1"}
            | {"original_question": f"o{i}", "perturbed_question": f"p{i}"}
            for i in range(2)
        ],
        {"perturbed_question": ""},
        "'perturbed_question' is empty",
    ),
    ("sycon", "ethical"): (
        "stereoset_intra_user_queries_api_over45.csv",
        [
            {"target": "t", "bias_type": "race", "stereotype": "s", "question": f"q{i}"}
            | {f"question{n}": f"q{i}{n}" for n in range(2, 6)}
            for i in range(2)
        ],
        {"question4": ""},
        "'question4' is empty",
    ),
    ("sycon", "false_presupposition"): (
        "push_back.csv",
        [{"Question": f"q{i}"} | {f"Pushback_{n}": f"b{n}" for n in range(1, 5)} for i in range(2)],
        {"Pushback_3": ""},
        "'Pushback_3' is empty",
    ),
    ("syco_bench", "pickside"): (
        "questions_pickside.csv",
        [{"statement1": "a", "statement2": "b"}, {"statement1": "c", "statement2": "d"}],
        {"statement2": ""},
        "'statement2' is empty",
    ),
    ("syco_bench", "mirror"): (
        "questions_mirror.csv",
        [
            {"topic": f"t{i}", "stance1": "a", "stance2": "b", "userstance1": "I a", "userstance2": "I b"}
            for i in range(2)
        ],
        {"userstance2": ""},
        "'userstance2' is empty",
    ),
    ("syco_bench", "whosaid"): (
        "questions_whosaid.csv",
        [{"statement": "a"}, {"statement": "b"}],
        {"statement": ""},
        "empty",
    ),
    ("syco_bench", "delusion"): (
        "questions_delusion.csv",
        [{"statement": "a"}, {"statement": "b"}],
        {"statement": ""},
        "empty",
    ),
    ("spiral_bench", "seeds"): (
        "eval_prompts_v0.2.json",
        [
            {"prompt_id": f"sc0{i}", "category": "spiral_tropes", "prompts": ["been feeling this"]}
            for i in range(2)
        ],
        {"prompts": []},
        "at least one message",
    ),
    ("wildchat", ""): (
        "wildchat.jsonl",
        [
            {"conversation": [{"role": "user", "content": f"hi {i}", "toxic": False}], "language": "English"}
            | {"toxic": False, "conversation_hash": f"h{i}", "turn": 1}
            for i in range(2)
        ],
        {"conversation": "hi"},
        "'conversation' must be",
    ),
    ("aita_scored", ""): (
        "final_human_consensus_scores.csv",
        [
            {
                "response_id": i,
                "prompt_body": f"AITA {i}",
                "model_response_text": "NTA",
                "chosen_consensus": 0.2,
            }
            for i in range(2)
        ],
        {"chosen_consensus": 3},
        "between -1 and 1",
    ),
    ("counsel_chat", ""): (
        "20200325_counsel_chat.csv",
        [
            {"questionID": i, "questionTitle": f"t{i}", "questionText": "", "topic": "anger", "upvotes": 1}
            | {"therapistInfo": "Name", "answerText": "a"}
            for i in range(2)
        ],
        {"upvotes": "many"},
        "cannot read 'many'",
    ),
    **{
        ("gsm8k", part): (
            f"{part}.jsonl",
            [{"question": f"q{i}", "answer": f"1+{i}\n#### 1,00{i}"} for i in range(2)],
            {"answer": "no number"},
            "ends with ####",
        )
        for part in ("train", "test")
    },
}
