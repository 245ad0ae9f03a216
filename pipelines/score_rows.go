// Scores digits of a JSON Lines file on a Triton, from Go. docs/cross-language.md says how to run it.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"log"
	"reflect"

	"github.com/apache/beam/sdks/v2/go/pkg/beam"
	"github.com/apache/beam/sdks/v2/go/pkg/beam/core/typex"
	_ "github.com/apache/beam/sdks/v2/go/pkg/beam/io/filesystem/local"
	"github.com/apache/beam/sdks/v2/go/pkg/beam/io/textio"
	"github.com/apache/beam/sdks/v2/go/pkg/beam/transforms/xlang/python"
	"github.com/apache/beam/sdks/v2/go/pkg/beam/x/beamx"
)

var (
	triton    = flag.String("triton", "http://localhost:8000", "URL of the server")
	expansion = flag.String("expansion", "localhost:8097", "address of Python's expansion service")
	files     = flag.String("files", "", "JSON Lines with the columns id and image")
	output    = flag.String("output", "", "what the names of the results' files begin with")
)

// digit is a row of the input.
type digit struct {
	ID    string    `beam:"id" json:"id"`
	Image []float32 `beam:"image" json:"image"`
}

// Rows that Python makes come as structs without a name, so these types are aliases of such.
type scored = struct {
	Id    string `beam:"id"`
	Label int64  `beam:"label"`
}

type failed = struct {
	Element digit  `beam:"element"`
	Msg     string `beam:"msg"`
	Stack   string `beam:"stack"`
}

// options are those of the transform; fields are named as its arguments are.
type options struct {
	Endpoint      string        `beam:"endpoint"`
	ModelName     string        `beam:"model_name"`
	Outputs       []string      `beam:"outputs"`
	Batching      batching      `beam:"batching"`
	ErrorHandling errorHandling `beam:"error_handling"`
}

type batching struct {
	MaxBatchSize int64 `beam:"max_batch_size"`
}

type errorHandling struct {
	Output string `beam:"output"`
}

type noArguments struct{}

func parse(line string) (digit, error) {
	var row digit
	err := json.Unmarshal([]byte(line), &row)
	return row, err
}

func scoredAsJSON(row scored) (string, error) {
	line, err := json.Marshal(map[string]any{"id": row.Id, "label": row.Label})
	return string(line), err
}

func failedAsJSON(row failed) (string, error) {
	line, err := json.Marshal(map[string]any{"id": row.Element.ID, "reason": row.Msg})
	return string(line), err
}

func init() {
	for _, function := range []any{parse, scoredAsJSON, failedAsJSON} {
		beam.RegisterFunction(function)
	}
	for _, value := range []any{digit{}, options{}, noArguments{}} {
		beam.RegisterType(reflect.TypeOf(value))
	}
}

func score(s beam.Scope, rows beam.PCollection) (results, failures beam.PCollection) {
	transform := python.NewExternalTransform[noArguments, options]("beam_triton.rows.TritonInference")
	transform.WithKwargs(options{
		Endpoint:      *triton,
		ModelName:     "digits",
		Outputs:       []string{"label"},
		Batching:      batching{MaxBatchSize: 64},
		ErrorHandling: errorHandling{Output: "failed"},
	})
	outputs := beam.CrossLanguage(s, "beam:transforms:python:fully_qualified_named",
		beam.CrossLanguagePayload(transform), *expansion, beam.UnnamedInput(rows),
		map[string]beam.FullType{
			"good":   typex.New(reflect.TypeOf(scored{})),
			"failed": typex.New(reflect.TypeOf(failed{})),
		})
	return outputs["good"], outputs["failed"]
}

func main() {
	flag.Parse()
	beam.Init()
	pipeline, s := beam.NewPipelineWithRoot()
	results, failures := score(s, beam.ParDo(s, parse, textio.Read(s, *files)))
	textio.Write(s, *output+"-scored.jsonl", beam.ParDo(s, scoredAsJSON, results))
	textio.Write(s, *output+"-failed.jsonl", beam.ParDo(s, failedAsJSON, failures))
	if err := beamx.Run(context.Background(), pipeline); err != nil {
		log.Fatal(err)
	}
}
